"""Tasks of lm-evaluation-harness on a checkpoint: a task and data that lie here, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from billhook.orchestrator import InputError, evaluate_tasks

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_a_task_is_run_and_its_metrics_are_returned(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [
        {"question": f"The number {n} is", "choices": [" even.", " odd, as is the next one"], "answer": n % 2}
        for n in range(6)
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = ("eval", llama, "--tasks", "tiny_choice", "--task-folder", tmp_path, "--dtype", "float32", "--json")
    command = [sys.executable, "-m", "billhook.orchestrator", *map(str, arguments)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]["tiny_choice"]

    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama).float()
    right = 0
    for row in rows:
        begin = tokenizer(row["question"], add_special_tokens=False, return_tensors="pt").input_ids
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(row["question"] + choice, add_special_tokens=False, return_tensors="pt").input_ids
            log_p = model(whole).logits.detach()[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
            scores.append(float(log_p[begin.shape[1] - 1 :].sum()))
        right += scores.index(max(scores)) == row["answer"]
    assert found["acc,none"] == right / len(rows)


def test_what_cannot_be_run_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--tasks: names no task"):
        evaluate_tasks(llama, [" "])
    with pytest.raises(InputError, match=r"--task-folder .*: there is no such folder"):
        evaluate_tasks(llama, ["piqa"], task_folder=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"the whole model, .* more than --ram"):
        evaluate_tasks(llama, ["piqa"], ram="10KiB")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"--tasks: .*'pip install lm_eval'"):
        evaluate_tasks(llama, ["piqa"])
