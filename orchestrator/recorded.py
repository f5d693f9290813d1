"""Evaluations that were recorded: the JSON documents of ``billhook eval --json``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.history import Decided
from billhook.orchestrator.paths import user_path

Perplexity = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
"""None: infinite."""


class RecordedReference(BaseModel):
    """The model that another was compared with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference: str
    perplexity: Perplexity
    divergence: float | None
    """Nats per token; None: infinite."""
    agreement: float


class Recorded(BaseModel):
    """What a document tells; keys beside these are of no account."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    checkpoint: str
    text: str
    perplexity: Perplexity
    windows: int
    tokens: int
    seqlen: int
    against: RecordedReference | None = None

    @property
    def protocol(self) -> tuple[str, int, int, int]:
        """What two perplexities must share to be compared."""
        return self.text, self.seqlen, self.windows, self.tokens


@dataclass(frozen=True)
class Pair:
    """A run's source and its output, evaluated alike."""

    dense: Perplexity
    pruned: Recorded
    distance: RecordedReference | None
    """Where the output was evaluated against the source."""


def read_recorded(file: str | Path) -> Recorded:
    """Read a document of ``billhook eval --json``.

    Raises:
        InputError: when it cannot be read, or is none.
    """
    try:
        return Recorded.model_validate_json(Path(file).read_bytes())
    except OSError as error:
        raise OptionError(f"--evaluation {file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise OptionError(
            f"--evaluation {file}: {where + ': ' if where else ''}{problem['msg']}; expected what "
            "'billhook eval CKPT --text FILE --json' prints"
        ) from error


def subject_of(checkpoint: str, output: Path, decided: Decided) -> str:
    """Return what was evaluated: ``pruned`` (the output), ``dense`` (the run's source), or else ``another``."""
    named = {str(user_path(checkpoint)), checkpoint}
    if str(user_path(output)) in named:
        return "pruned"
    return "dense" if named & {str(user_path(decided.source)), decided.asked["model"]} else "another"


def pairs(recorded: Sequence[Recorded], output: Path, decided: Decided) -> Iterator[Pair]:
    """Yield what can be compared: on the same text, by the same protocol."""
    subjects = [(each, subject_of(each.checkpoint, output, decided)) for each in recorded]
    for pruned in (each for each, subject in subjects if subject == "pruned"):
        if pruned.against is not None and subject_of(pruned.against.reference, output, decided) == "dense":
            yield Pair(pruned.against.perplexity, pruned, pruned.against)
        for dense in (each for each, subject in subjects if subject == "dense"):
            if dense.protocol == pruned.protocol:
                yield Pair(dense.perplexity, pruned, None)
