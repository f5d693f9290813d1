"""What each row of a linear loses, as text: numbers, where ``13*4`` says that four rows in turn lose 13."""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Sequence

_TEXT = re.compile(r"\d{1,9}(\*\d{1,9})?( \d{1,9}(\*\d{1,9})?)*", re.ASCII)


def text_of(counts: Sequence[int]) -> str:
    """Return the text of some counts."""
    runs = ((count, sum(1 for _ in alike)) for count, alike in itertools.groupby(counts))
    return " ".join(f"{count}*{times}" if times > 1 else str(count) for count, times in runs)


def read_counts(text: str, most: int) -> array[int] | None:
    """Return the counts; None where the text is none, or of more rows than ``most``."""
    if _TEXT.fullmatch(text) is None:
        return None
    runs = [(int(count), int(times or 1)) for count, _, times in (run.partition("*") for run in text.split(" "))]
    if sum(times for _, times in runs) > most:
        return None
    counts = array("i")
    for count, times in runs:
        counts.extend(itertools.repeat(count, times))
    return counts
