"""What it costs to tell of a run: the seconds spent in telling events, against those of the run that they come from.

One run of a real model on a terminal of its own, with all that listens: the log in the run's folder, the live display,
TensorBoard. In that run, every call of a listener is timed, and every refresh of the display, which has a thread of
its own; all of that is counted as if the run had waited for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import this_machine

RESULTS = Path(__file__).parent / "results" / "events_overhead.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output is not None:
        print(json.dumps(timed_run(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = on_a_terminal([sys.executable, __file__, *sys.argv[1:], "--output", f"{folder}/out"])
    found["share"] = round(sum(found["seconds_by_listener"].values()) / found["seconds"], 5)
    found |= {"model": Path(arguments.model).name, "samples": arguments.samples, "seqlen": arguments.seqlen}
    found |= {"machine": this_machine()}
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def on_a_terminal(command: list[str]) -> dict[str, Any]:
    """Run a command whose standard error is a terminal; return the document that it prints."""
    terminal, end = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while os.read(terminal, 1 << 16):
                pass

    threading.Thread(target=drain, daemon=True).start()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, check=True, env=environment)
    os.close(end)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune; return the seconds of the run, those of each listener, waiting included or not, and its calls."""
    from rich.live import Live

    from billhook.orchestrator import driver, prune
    from billhook.orchestrator.progress import shown_progress

    seconds: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            begin, busy_before = time.monotonic(), time.thread_time()
            try:
                return real(*given)
            finally:
                seconds[name] += time.monotonic() - begin
                busy[name] += time.thread_time() - busy_before
                calls[name] += 1

        return call

    together, names = driver.together, iter([("log", "display"), ("", "tensorboard")])

    def all_timed(*listeners: Callable[..., Any]) -> Any:
        named = zip(next(names), listeners, strict=True)
        return together(*(timed(name, each) if name else each for name, each in named))

    driver.together = all_timed
    Live.refresh = timed("refreshes", Live.refresh)  # type: ignore[method-assign]
    begin = time.monotonic()
    with shown_progress() as progress:
        prune(
            arguments.model,
            arguments.output,
            calibration="random",
            samples=arguments.samples,
            seqlen=arguments.seqlen,
            log_to="tensorboard",
            progress=progress,
        )
    whole = time.monotonic() - begin
    return {
        "seconds": round(whole, 2),
        "seconds_by_listener": {name: round(spent, 4) for name, spent in seconds.items()},
        "processor_seconds_by_listener": {name: round(spent, 4) for name, spent in busy.items()},
        "calls": dict(calls),
    }


if __name__ == "__main__":
    main()
