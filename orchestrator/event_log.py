"""The log of a run, ``events.jsonl``: one line for each event, with its time; written, read, and described.

``python -m billhook.orchestrator.event_log`` prints the page ``docs/events.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from billhook.orchestrator.events import Beat, Event, LoggedEvent
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.paths import user_path


@dataclass(frozen=True)
class Logged:
    """One line of the log."""

    time: float
    """Seconds since the epoch."""
    event: LoggedEvent


def log_path(output: Path) -> Path:
    """Return where an output's log lies."""
    return output / FOLDER / "events.jsonl"


def log(output: Path, event: Event) -> None:
    """Append an event, but for beats, to the log of the run in ``output``.

    Nothing depends on the log: where the disk fails, what cannot be written is left out.
    """
    if isinstance(event, Beat):
        return
    fields = dataclasses.asdict(event)
    line = {"time": round(time.time(), 3), "event": fields.pop("event"), **fields}
    with suppress(OSError), log_path(output).open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def read_events(output: str | Path) -> list[Logged]:
    """Return the events of the run in ``output``, those of all its commands; empty where there are none.

    Lines that are torn, as by a power failure, or of another version, are left out.
    """
    try:
        lines = log_path(user_path(output)).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(parse(line))
    return found


def parse(line: bytes | str) -> Logged:
    """Return the event of one line.

    Raises:
        ValueError: when it is none of this version.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(fields.get("time"), int | float):
        raise ValueError("expected an object with a time")
    at = fields.pop("time")
    return Logged(float(at), _adapter().validate_python(fields))


@functools.cache
def _adapter() -> TypeAdapter[LoggedEvent]:
    return TypeAdapter(LoggedEvent, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))


def events_page() -> str:
    """Return the documentation of every event and key, as Markdown, from the classes' own docstrings."""
    schema = _adapter().json_schema()
    parts = [_HEAD]
    definitions: dict[str, Any] = schema["$defs"]
    for reference in schema["anyOf"]:
        definition = definitions[reference["$ref"].rpartition("/")[2]]
        parts.append(_section(f"`{definition['properties']['event']['const']}`", definition))
    linear = definitions["LinearReport"]
    parts.append(_section("A linear", linear))
    return "\n".join(parts)


_HEAD = """# Events

<!-- Made by `python -m billhook.orchestrator.event_log > docs/events.md`: a test compares. -->

A run tells what happens in `OUT/billhook/events.jsonl`: one JSON object a line, each with its `time` (seconds since the
epoch) and its kind, `event`. A command that goes on with a run appends to the same file; of a block that was redone the
last line holds. Nothing depends on the file, and what is timed is in no other of the output.

    jq 'select(.event == "block") | {index, seconds, error: (.linears | map(.error) | max)}' OUT/billhook/events.jsonl

From Python the same events, as frozen dataclasses, come to the callback `progress`, and are read from the file by
`read_events`:

```python
from billhook.orchestrator import prune, read_events
from billhook.orchestrator.events import BlockDone

prune("path/to/model", "OUT", calibration="text.txt", progress=print)  # a line for each event
blocks = [line.event for line in read_events("OUT") if isinstance(line.event, BlockDone)]
errors = [max(linear.error for linear in block.linears) for block in blocks]
```

The callback is told of one more kind, `Beat`: what every worker does at the moment. It is called in the thread that
called `prune`; what it raises ends the run, which can be gone on with. `shown_progress()` gives the callback that the
command line uses: a live page on a terminal, plain lines elsewhere, as in a notebook.

In the tables `[number]` is a list and `{name: number}` an object.
"""


def _section(title: str, definition: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | `{_type(each)}` | {_text(each)} |"
        for name, each in definition["properties"].items()
        if name != "event"
    ]
    return "\n".join([f"## {title}", "", _text(definition), "", "| key | type | meaning |", "|---|---|---|", *rows, ""])


def _type(schema: dict[str, Any]) -> str:
    """Return a key's type: ``[number]`` is a list, ``{name: number}`` an object with any names."""
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return "linear"
    if "prefixItems" in schema:
        return f"[{', '.join(_type(each) for each in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"[{_type(schema['items'])}]"
    if schema.get("type") == "object":
        return f"{{name: {_type(schema['additionalProperties'])}}}"
    return str(schema["type"])


def _text(definition: dict[str, Any]) -> str:
    plain = re.sub(r":\w+:`", "`", definition.get("description", "")).replace("``", "`")
    return " ".join(plain.split())


if __name__ == "__main__":
    print(events_page(), end="")
