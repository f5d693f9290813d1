"""Pruning as the papers describe it, in plain PyTorch: one of the peers that `peers.py` measures against.

    python benchmarks/reference_flow.py --model DIR --tokens FILE -o OUT --method sparsegpt --pattern 2:4

The whole model is in memory. Each block runs twice on every sample: with a hook at every linear that gathers that
linear's own statistic, and, when the block is pruned, for the inputs of the next. SparseGPT (arXiv 2301.00774,
Algorithm 1) goes column by column; Wanda (arXiv 2306.11695) sorts. It is written from the formulas, with nothing of
what this project adds. FILE holds the calibration samples, a JSON list of lists of tokens. Prints one line of JSON:
the seconds from the begin of the first block to the saved checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SPARSITY = 0.5
DAMPING = 0.01
BLOCK_COLUMNS = 128


class Stop(Exception):  # noqa: N818 - no error: the first block has its inputs
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], required=True)
    parser.add_argument("--pattern", choices=["unstructured", "2:4"], required=True)
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    samples = [torch.tensor([tokens]) for tokens in json.loads(arguments.tokens.read_text())]
    begin = time.monotonic()
    prune(model, samples, arguments.method, arguments.pattern)
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    print(json.dumps({"seconds": time.monotonic() - begin}))


@torch.no_grad()
def prune(model: Any, samples: list[Tensor], method: str, pattern: str) -> None:
    blocks = model.model.layers
    inputs, arguments = first_inputs(model, blocks[0], samples)
    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        statistics = {linear: statistic(method, linear) for linear in linears}
        hooks = [linear.register_forward_pre_hook(adder(method, statistics[linear])) for linear in linears]
        for x in inputs:
            block(x, **arguments)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            weight_RC = linear.weight.data.float()
            solve = sparsegpt if method == "sparsegpt" else wanda
            linear.weight.data = solve(weight_RC, statistics.pop(linear), pattern).to(linear.weight.dtype)
        inputs = [block(x, **arguments) for x in inputs]


def first_inputs(model: Any, block: nn.Module, samples: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the hidden states that enter the first block, and what else every block is called with."""
    inputs: list[Tensor] = []
    keywords: dict[str, Any] = {}

    def catch(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        inputs.append(args[0])
        keywords.update(given)
        raise Stop

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    for tokens in samples:
        with contextlib.suppress(Stop):
            model(tokens, use_cache=False)
    hook.remove()
    return inputs, keywords


def statistic(method: str, linear: nn.Linear) -> Tensor:
    columns = linear.in_features
    return torch.zeros(columns, columns) if method == "sparsegpt" else torch.zeros(columns)


def adder(method: str, total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x_TC = args[0].reshape(-1, args[0].shape[-1]).float()
        if method == "sparsegpt":
            total.add_(x_TC.T @ x_TC)
        else:
            total.add_(x_TC.square().sum(dim=0))

    return add


def wanda(weight_RC: Tensor, squares_C: Tensor, pattern: str) -> Tensor:
    score_RC = weight_RC.abs() * squares_C.sqrt()
    if pattern == "2:4":
        smallest = score_RC.view(len(score_RC), -1, 4).argsort(dim=2)[..., :2]
        return weight_RC.view(len(score_RC), -1, 4).scatter(2, smallest, 0.0).view_as(weight_RC)
    smallest = torch.sort(score_RC, dim=1, stable=True).indices[:, : int(SPARSITY * weight_RC.shape[1])]
    return weight_RC.scatter(1, smallest, 0.0)


def sparsegpt(weight_RC: Tensor, gram_CC: Tensor, pattern: str) -> Tensor:
    columns = weight_RC.shape[1]
    dead_C = gram_CC.diagonal() == 0
    gram_CC.diagonal()[dead_C] = 1.0
    weight_RC[:, dead_C] = 0.0
    gram_CC.diagonal().add_(DAMPING * gram_CC.diagonal().mean())
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(gram_CC))
    u_CC = torch.linalg.cholesky(inverse_CC, upper=True)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        w_RB, u_BB = weight_RC[:, start:stop].clone(), u_CC[start:stop, start:stop]
        error_RB, pruned_RB = torch.zeros_like(w_RB), torch.zeros_like(w_RB, dtype=torch.bool)
        if pattern == "unstructured":
            score_RB = (w_RB / u_BB.diagonal()).square()
            pruned_RB = score_RB <= score_RB.flatten().sort().values[int(SPARSITY * score_RB.numel())]
        for j in range(stop - start):
            if pattern == "2:4" and j % 4 == 0:
                score_R4 = (w_RB[:, j : j + 4] / u_BB.diagonal()[j : j + 4]).square()
                pruned_RB.scatter_(1, j + score_R4.topk(2, dim=1, largest=False).indices, True)
            kept_R = torch.where(pruned_RB[:, j], 0.0, w_RB[:, j])
            error_RB[:, j] = (w_RB[:, j] - kept_R) / u_BB[j, j]
            w_RB[:, j:] -= error_RB[:, j, None] * u_BB[j, j:]
            w_RB[:, j] = kept_R
        weight_RC[:, start:stop] = w_RB
        weight_RC[:, stop:] -= error_RB @ u_CC[start:stop, stop:]
    return weight_RC


if __name__ == "__main__":
    main()
