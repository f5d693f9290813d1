"""The report of a run: one HTML file that tells, of a run in whatever state, what was done and what it took."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from billhook.layerworkers.errors import NoRunError, OutputError
from billhook.orchestrator.history import is_collection, read_history
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.recorded import read_recorded

REPORT = "report.html"


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    path: Path

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it: a frame of its own, which can do nothing to the notebook."""
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" title="{html.escape(str(self.path))}" '
            'style="width: 100%; height: 80vh; min-height: 480px; border: 0"></iframe>'
        )


def report(output: str | Path, file: str | Path | None = None, *, evaluations: Sequence[str | Path] = ()) -> Report:
    """Write the report of the run in ``output``: finished, interrupted or still going on.

    file: where it is written, by default to ``billhook/report.html`` in the output, where ``prune`` writes it too.
    evaluations: JSON documents of ``billhook eval --json``, of the source and of the output.

    Raises:
        InputError: when the folder holds no run, an evaluation cannot be read, or the file cannot be written.
    """
    from billhook.orchestrator.reporting.page import page
    from billhook.orchestrator.reporting.record import read_record

    folder = user_path(output)
    target = folder / FOLDER / REPORT if file is None else user_path(file)
    if target != folder / FOLDER / REPORT and folder in target.parents:
        raise OutputError(
            f"-o {file}: is in the output, which holds the checkpoint only; leave it out, or choose another"
        )
    if is_collection(read_history(folder)):
        raise NoRunError(f"{output}: holds collected statistics, of which there is no report; see 'billhook status'")
    text = page(read_record(folder), [read_recorded(each) for each in evaluations])
    try:
        _replace(target, text)
    except OSError as error:
        raise OutputError(f"-o {target}: cannot be written: {error.strerror}; choose another file") from error
    return Report(target)


def _replace(target: Path, text: str) -> None:
    """Write a file whole or not at all: a browser may have it open, and a run may write it meanwhile."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name may hold what no text can
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
