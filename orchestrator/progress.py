"""Progress on standard error: a live display on a terminal, a plain line for each event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from billhook.orchestrator.events import Beat, Event, Progress, Step

REFRESHES_PER_SECOND = 1.0


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield a progress callback that a person can follow."""
    if not sys.stderr.isatty():
        yield _print_line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from billhook.orchestrator.run_facts import RunFacts, followed
    from billhook.orchestrator.run_page import run_page

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    facts = RunFacts(since=time.time())

    def show(event: Event) -> None:
        nonlocal facts
        facts = followed(facts, event, time.time())
        if not (isinstance(event, Beat) or (isinstance(event, Step) and not event.message)):
            console.print(Text(str(event)))

    def render() -> Text:
        found = run_page(facts, time.time())
        found.no_wrap = True  # a page that wraps cannot be drawn over
        return found

    with Live(get_renderable=render, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True):
        yield show


def _print_line(event: Event) -> None:
    if not isinstance(event, Beat):
        print(f"{time.strftime('%H:%M:%S')} {event}", file=sys.stderr, flush=True)
