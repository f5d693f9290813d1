"""Write `docs/benchmarks.md` from what `make bench` has put into `benchmarks/results/`.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


def main() -> None:
    sections = [
        *peers(read("peers")),
        *fidelity(read("fidelity")),
        *solve(read("solve")),
        *limit(read("scaling")),
        *large_block(read("large_block")),
        *growth(read("growth")),
    ]
    PAGE.write_text("\n".join([HEAD, *sections]) + "\n")


HEAD = """# Benchmarks

Written by `benchmarks/report.py` from `benchmarks/results/`; each section names the command whose figures it shows. All
are of one machine without a GPU, and ratios are of runs that took turns. What else is measured, and how:
[benchmarks/README.md](../benchmarks/README.md).
"""


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return document


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def peers(results: dict[str, Any]) -> list[str]:
    machine, versions = results["machine"], results["versions"]
    lines = [
        "## Beside other tools",
        "",
        "SmolLM2-135M-Instruct, 32 samples of 512 tokens, bfloat16, "
        f"{machine['cores']} cores ({machine['processor']}); "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". *Work* is from the begin of the first block to the finished checkpoint, *whole* the whole command; "
        "medians of runs that took turns. Memory is the largest sum of proportional set sizes, of billhook with one "
        "worker (Ray's own processes in brackets). Perplexity: WikiText-2 test, 32 windows of 1024 tokens.",
        "",
        "    make bench CALIBRATION=wikitext2-valid.txt TEXT=wikitext2-raw-test.txt",
        "",
    ]
    heads = ["", "work, s", "whole, s", "billhook / it: work", "whole", "memory, GiB", "perplexity"]
    for recipe, rows in results["rows"].items():
        body = []
        for tool, row in rows.items():
            gib, of_ray = row["peak_bytes"] / 2**30, row["peak_bytes_of_ray"] / 2**30
            body.append(
                [
                    tool,
                    f"{row['work_seconds']:.1f}",
                    f"{row['whole_seconds']:.1f}",
                    f"{row['billhook_over_it_work']:.2f}",
                    f"{row['billhook_over_it_whole']:.2f}",
                    f"{gib - of_ray:.2f} (+ {of_ray:.2f})" if of_ray else f"{gib:.2f}",
                    f"{row['perplexity']:.2f}",
                ]
            )
        lines += [f"**{recipe}**", "", *table(heads, body)]
    return lines


def fidelity(results: dict[str, Any]) -> list[str]:
    """Return the perplexities and divergences of every method and allocator that was measured on all texts."""
    measured = {
        name: by_seed["0"]
        for name, by_seed in results["figures"].items()
        if by_seed.get("0", {}).get("texts") and " correction " not in name
    }
    texts = list(next(iter(measured.values()))["texts"])
    patterns = ["unstructured 0.5", "unstructured 0.6", "unstructured 0.7", "2:4"]
    titles = ["50 %", "60 %", "70 %", "2:4"]
    at_half = {name.partition(" ")[0]: each["perplexity"] for name, each in measured.items() if name.endswith(" 0.5")}
    methods = sorted(
        {name.partition(" ")[0] for name in measured}, key=lambda name: (at_half.get(name, math.inf), name)
    )

    def figures(method: str, pattern: str, allocation: str = "") -> str:
        found = measured.get(" ".join(filter(None, (method, pattern, allocation))))
        if found is None:
            return ""
        on = [found["texts"][text] for text in texts]
        perplexities = " / ".join(f"{each['perplexity']:.2f}" for each in on)
        return perplexities + " (" + ", ".join(f"{each['divergence']:.2f}" for each in on) + ")"

    rows = [[method, *(figures(method, pattern) for pattern in patterns)] for method in methods]
    allocated = [
        [allocation, *(figures(method, patterns[2], allocation) for method in ("wanda", "sparsegpt"))]
        for allocation in dict.fromkeys(name.rpartition(" ")[2] for name in measured if len(name.split()) == 4)
    ]
    dense = " / ".join(f"{results['dense_texts'][text]['perplexity']:.2f}" for text in texts)
    lines = [
        "## Quality by method",
        "",
        "SmolLM2-135M-Instruct, 32 samples of 512 tokens of WikiText-2, one draw; each method with its defaults. "
        f"Perplexity on WikiText-2 / on a text of another kind, Python's help topics (dense: {dense}), and in brackets "
        "the KL divergence from the dense model on both, in nats per token. What is empty has not been measured.",
        "",
        "    python benchmarks/fidelity.py --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt "
        "--text python-topics.txt",
        "",
        *table(["", *titles], rows),
    ]
    return [*lines, "Allocations at 70 %:", "", *table(["", "wanda", "sparsegpt"], allocated)] if allocated else lines


def solve(results: dict[str, Any]) -> list[str]:
    lines = [
        "## One linear",
        "",
        f"SparseGPT for one linear of {results['size']} x {results['size']}, against the plain column loop; *sweep*: "
        "all blocks of 128 columns with the same mask; *solve*: from the Gram matrix to sparse weights.",
        "",
        "    python benchmarks/solve.py",
        "",
    ]
    rows = [
        [name, f"{row['our_seconds']:.2f}", f"{row['plain_seconds']:.2f}", f"{row['plain_over_ours']:.1f}"]
        for name, row in results.items()
        if isinstance(row, dict) and "plain_over_ours" in row
    ]
    return [*lines, *table(["", "billhook, s", "plain, s", "plain / billhook"], rows)]


def limit(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Against the limit",
        "",
        f"{results['model']}, {results['options']['samples']} samples of {results['options']['seqlen']} tokens: "
        "seconds of one block, by part: measured / predicted from what its products take at the rate of a large one, "
        "and messages at the rate of a copy, measured in the same run.",
        "",
        "    python benchmarks/scaling.py measure --folder DIR",
        "",
    ]
    return [*lines, *parts_of_block(results)]


def parts_of_block(results: dict[str, Any]) -> list[str]:
    runs = {name: run for name, run in results.items() if isinstance(run, dict) and "measured_parts" in run}
    if not runs:
        raise SystemExit("results/scaling.json has no parts: run benchmarks/scaling.py measure again")
    parts = list(next(iter(runs.values()))["predicted_parts"])
    rows = [
        [
            name,
            *(f"{run['measured_parts'][part]:.2f} / {run['predicted_parts'][part]:.2f}" for part in parts),
            f"{run['predicted_seconds'] / run['measured_seconds']:.0%}",
        ]
        for name, run in runs.items()
    ]
    return table(["", *parts, "of the limit"], rows)


def large_block(results: dict[str, Any]) -> list[str]:
    runs = {name: run for name, run in results.items() if isinstance(run, dict) and "hours" in run}
    machines = list(next(iter(runs.values()))["hours"])
    whole = results["whole"]
    return [
        "## A block of a 70B Llama",
        "",
        f"Hidden size 8192, intermediate size 28672, {results['samples']} samples of {results['seqlen']} tokens, a "
        "worker on each core: seconds of the second of two blocks, by part, as above.",
        "",
        "    python benchmarks/large_block.py --folder DIR",
        "",
        *parts_of_block(runs),
        f"Hours for all 80 blocks from {whole['samples']} samples of {whole['seqlen']} tokens. *This machine*: as "
        "planned, times what the measured block took over what was planned for it. GPUs: as planned, each on a node of "
        "its own, at half of what data sheets promise; **none was at hand**.",
        "",
        *table(
            ["", *machines], [[name, *(f"{run['hours'][each]:.2f}" for each in machines)] for name, run in runs.items()]
        ),
    ]


def growth(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Growth",
        "",
        "SparseGPT on synthetic Llamas, one quantity varied at a time: seconds of the block loop behind its first "
        "block, peak memory, and the exponents of the power laws that fit them.",
        "",
        "    python benchmarks/growth.py --folder DIR",
        "",
    ]
    rows = [
        [
            axis,
            ", ".join(f"{x}: {seconds:.1f} s, {run['peak_bytes'][x] / 2**30:.2f} GiB" for x, seconds in each.items()),
            f"{run['exponent_of_seconds']:.2f}",
            f"{run['exponent_of_peak']:.2f}",
        ]
        for axis, run in results.items()
        if isinstance(run, dict) and (each := run.get("seconds"))
    ]
    return [*lines, *table(["", "figures", "time", "memory"], rows)]


if __name__ == "__main__":
    main()
