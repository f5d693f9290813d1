"""What ``make screenshots`` runs: prune SmolLM2-135M with OWL and SparseGPT, evaluate it, and report on it.

    python examples/report.py FOLDER

The report is FOLDER/report.html.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from demo import billhook, split_text
from smollm2 import smollm2_folder


def main() -> None:
    folder, model = Path(sys.argv[1]), smollm2_folder()
    folder.mkdir(parents=True)
    calibration, evaluation = split_text(None, folder)
    output, quality = folder / "SmolLM2-135M-owl-sparsegpt-50", folder / "quality.json"
    billhook(
        "prune", model, "-o", output, "--method", "sparsegpt", "--sparsity", "0.5", "--allocation", "owl",
        "--calibration", calibration, "--samples", 16, "--seqlen", 512, "--workers", 2,
        "--ram", "4GiB", "--disk", "1GiB",
    )  # fmt: skip
    measured = billhook("eval", output, "--against", model, "--text", evaluation, "--seqlen", 512, "--windows", 16)
    quality.write_text(json.dumps(measured))
    billhook("report", output, "-o", folder / "report.html", "--evaluation", quality)


if __name__ == "__main__":
    main()
