"""SparseGPT for one linear, 4096 x 4096, against the plain column loop: the sweep alone, and the whole solve.

    python benchmarks/solve.py [--rounds 3] [--size 4096]

On one thread and on two, in turns. *sweep* is that of all blocks of 128 columns, with the same mask: ours against
``sweep_masked_reference``, which is the plain loop. *solve* begins with the Gram matrix and ends with sparse weights:
factorisation, selection, sweeps and updates, against ``reference_flow.sparsegpt``. Medians of ratios go to
``benchmarks/results/solve.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # as in a worker; read when SciPy is imported

import torch
from machine import this_machine
from reference_flow import BLOCK_COLUMNS, sparsegpt
from threadpoolctl import threadpool_limits
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "solve.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": this_machine(), "size": arguments.size}
    torch.manual_seed(0)
    weight_RC = torch.randn(arguments.size, arguments.size)
    x_TC = torch.randn(2 * arguments.size, arguments.size) @ torch.diag(torch.rand(arguments.size) + 0.1)
    gram_CC = x_TC.T @ x_TC
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for name, (ours, plain) in {
                "sweep": sweeps(weight_RC, gram_CC),
                "solve": solves(weight_RC, gram_CC),
            }.items():
                ours(), plain()
                rounds = [(seconds(ours), seconds(plain)) for _ in range(arguments.rounds)]
                results[f"{name}, {threads} thread(s)"] = {
                    "plain_over_ours": round(statistics.median(other / own for own, other in rounds), 2),
                    "all": [round(other / own, 2) for own, other in rounds],
                    "our_seconds": round(statistics.median(own for own, _ in rounds), 3),
                    "plain_seconds": round(statistics.median(other for _, other in rounds), 3),
                }
                print(name, threads, results[f"{name}, {threads} thread(s)"], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def sweeps(weight_RC: Tensor, gram_CC: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    from billhook.kernels.sweep import sweep_masked, sweep_masked_reference

    corner_BB = torch.linalg.cholesky(
        torch.linalg.inv(gram_CC[:BLOCK_COLUMNS, :BLOCK_COLUMNS]), upper=True
    ).contiguous()
    blocks = [block.contiguous() for block in weight_RC.split(BLOCK_COLUMNS, dim=1)]
    masks = [torch.rand_like(block) < 0.5 for block in blocks]

    def all_blocks(sweep: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for block, mask in zip(blocks, masks, strict=True):
                sweep(block.clone(), corner_BB, mask)

        return run

    return all_blocks(sweep_masked), all_blocks(sweep_masked_reference)


def solves(weight_RC: Tensor, gram_CC: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    from billhook.layerworkers.collective import Alone
    from billhook.layerworkers.methods.sparsegpt import SPARSEGPT, Options
    from billhook.layerworkers.patterns import Selector, Unstructured
    from billhook.layerworkers.problem import LinearProblem

    def ours() -> Tensor:
        problem = LinearProblem(gram_CC.clone(), len(gram_CC), 256, Alone(), torch.device("cpu"))
        select = Selector(Unstructured(Fraction(1, 2)), SPARSEGPT.within_rows, Alone())
        return SPARSEGPT.solve(weight_RC.clone(), problem, select, Options()).weight_RC

    def plain() -> Tensor:
        return sparsegpt(weight_RC.clone(), gram_CC.clone(), "unstructured")

    alike = float(((ours() == 0) == (plain() == 0)).double().mean())
    assert alike > 0.999, f"only {alike:.4%} of the mask is the same"
    return ours, plain


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
