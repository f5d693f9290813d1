"""One run of llm-compressor on the work of `peers.py`, by the Python of an environment that has llm-compressor.

Same options and output as `reference_flow.py`; the seconds are those of ``oneshot`` and of saving.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], required=True)
    parser.add_argument("--pattern", choices=["unstructured", "2:4"], required=True)
    arguments = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    samples = json.loads(arguments.tokens.read_text())
    dataset = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(each) for each in samples]})
    modifier = SparseGPTModifier if arguments.method == "sparsegpt" else WandaPruningModifier
    structure = "0:0" if arguments.pattern == "unstructured" else arguments.pattern
    recipe = modifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    begin = time.monotonic()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(json.dumps({"seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
