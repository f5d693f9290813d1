"""Token windows for calibration and evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from billhook.layerworkers.errors import InputError, OptionError, TextError
from billhook.layerworkers.methods import COLLECT, method_named
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.tasks import Sample
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.recipe import Recipe

CHARACTERS_PER_TOKEN = 8
"""Characters of a dataset that are gathered for every token asked for: more than any tokenizer needs for English."""


@dataclass(frozen=True)
class Windows:
    """Equally long windows of tokens."""

    tokens: tuple[tuple[int, ...], ...]
    sha256: str
    """Hash of the tokens as little-endian int64, window after window."""

    def first(self, count: int) -> Windows:
        """Return the first windows, as part of these: with the hash of all."""
        return replace(self, tokens=self.tokens[:count])


def default_seqlen(config: Any) -> int:
    """Return ``min(2048, context)`` of a transformers config."""
    text = config.get_text_config()
    return min(2048, getattr(text, "max_position_embeddings", None) or 2048)


def _asking(recipe: Recipe) -> str:
    """Return what of a recipe asks for samples."""
    method = method_named(recipe.method)
    if method is COLLECT:
        return "collect"
    alone = method.statistic is None and recipe.reconstruct
    return f"--reconstruct {recipe.reconstruct}" if alone else f"--method {recipe.method}"


def calibration_windows(recipe: Recipe, folder: Path, config: Any) -> Windows:
    """Draw the calibration windows that the recipe asks for.

    The text is tokenised once, as one string, without special tokens. Window starts are
    ``torch.randint(0, tokens - length - 1, (samples,))`` with the recipe's seed; windows are never padded.

    Raises:
        InputError: when there is no text, too little of it, or no tokenizer.
    """
    seqlen = recipe.seqlen or default_seqlen(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.calibration is None:
        raise OptionError(
            f"{_asking(recipe)} needs calibration samples: give --calibration FILE (a text or JSONL file), a "
            "Hugging Face dataset, or 'random' for random tokens"
        )
    if recipe.calibration == "random":
        vocabulary = config.get_text_config().vocab_size
        drawn = torch.randint(0, vocabulary, (recipe.samples, seqlen), generator=generator)
        return _windows([tuple(row) for row in drawn.tolist()])
    tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
    text = read_text(recipe.calibration, recipe.field, recipe.samples * seqlen * CHARACTERS_PER_TOKEN)
    tokens = tokenise(tokenizer, text)
    first = bos_tokens(tokenizer, recipe.bos)
    length = seqlen - len(first)
    needed = recipe.samples * length + 1
    if len(tokens) < max(needed, length + 2):
        raise TextError(
            f"--calibration {recipe.calibration}: {len(tokens)} tokens, shorter than the {needed} that "
            f"{recipe.samples} samples of {seqlen} tokens ask for: give a longer text, or lower --samples or --seqlen"
        )
    highest = len(tokens) - length - 1
    starts = torch.randint(0, highest, (recipe.samples,), generator=generator).tolist()
    return _windows([(*first, *tokens[start : start + length]) for start in starts])


def evaluation_windows(tokenizer: Any, text: str, seqlen: int, windows: int | None, bos: str, name: str) -> Windows:
    """Cut the first ``windows`` (None: all) non-overlapping windows of ``seqlen`` tokens; the remainder is dropped.

    Raises:
        InputError: when the text is shorter than what is asked for.
    """
    first = bos_tokens(tokenizer, bos)
    length = seqlen - len(first)
    tokens = tokenise(tokenizer, text)
    available = len(tokens) // length
    wanted = available if windows is None else windows
    if available < max(1, wanted):
        raise TextError(
            f"--text {name}: {len(tokens)} tokens make {available} windows of {seqlen}, {max(1, wanted)} were asked "
            "for: give a longer text, or lower --windows or --seqlen"
        )
    return _windows([(*first, *tokens[index * length : (index + 1) * length]) for index in range(wanted)])


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Load the checkpoint's tokenizer.

    Raises:
        InputError: when it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, by file that is missing or malformed
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"{folder}: no tokenizer could be loaded ({first_line}); add the tokenizer files, or use "
            "--calibration random"
        ) from error


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a whole text at once, without special tokens."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def bos_tokens(tokenizer: Any, bos: str) -> tuple[int, ...]:
    """Return what each window starts with: BOS or nothing; ``auto`` asks what the tokenizer itself does.

    Raises:
        InputError: for ``always`` when the tokenizer has no BOS token.
    """
    token = tokenizer.bos_token_id
    if bos == "never":
        return ()
    if bos == "always":
        if token is None:
            raise OptionError("--bos always: the tokenizer has no BOS token; use --bos never")
        return (token,)
    starts = tokenizer("a")["input_ids"][:1]
    return (token,) if token is not None and starts == [token] else ()


def read_text(source: str, field: str, characters: int | None) -> str:
    """Read a text file, a JSONL file (``.jsonl``, documents joined by blank lines), or a Hugging Face dataset.

    characters: how much is taken of a dataset; None takes all of it.

    Raises:
        InputError: when the source is missing or has no such field.
    """
    path = user_path(source)
    try:
        if path.is_file():
            if path.suffix == ".jsonl":
                return "\n\n".join(_jsonl_documents(path, field))
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is not UTF-8 text: {error}") from error
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix in {".txt", ".jsonl", ".json", ".md"}:
        raise TextError(f"{source}: no such file")
    return _dataset_text(source, field, characters)


def _jsonl_documents(path: Path, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)[field]
        except (ValueError, TypeError, RecursionError) as error:
            raise TextError(f"{path}, line {number}: is not a JSON object") from error
        except KeyError as error:
            raise TextError(f"{path}, line {number}: has no field {field!r}; name it with --field") from error
        documents.append(_checked_text(document, f"{path}, line {number}", field))
    return documents


def _checked_text(document: object, where: str, field: str) -> str:
    if not isinstance(document, str):
        raise TextError(
            f"{where}: field {field!r} holds {type(document).__name__}, expected text; name it with --field"
        )
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where}: field {field!r} holds half of a surrogate pair, which is no text: {error}"
        ) from error
    return document


def _dataset_text(source: str, field: str, characters: int | None) -> str:
    """Join the first documents of a dataset ``NAME[:CONFIG[:SPLIT]]`` until there are enough characters."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(
            f"{source}: no such file; for a Hugging Face dataset of this name, 'pip install billhook[datasets]'"
        ) from error
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split or "train", streaming=True)
        documents, total = [], 0
        for row in dataset:
            if field not in row:
                raise TextError(f"{source}: rows have the fields {', '.join(row)}, not {field!r}; name it with --field")
            documents.append(_checked_text(row[field], source, field))
            total += len(documents[-1])
            if characters is not None and total >= characters:
                break
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many kinds: all mean that there is no such dataset here
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(f"{source}: no such file, and no dataset of this name could be read: {first_line}") from error
    return "\n\n".join(documents)


def check_vocabulary(windows: Windows, rows: int, source: str) -> None:
    """Check that the embedding matrix has a row for every token.

    Raises:
        InputError: when the tokenizer makes tokens that the model does not have.
    """
    highest = max(max(window) for window in windows.tokens)
    if highest >= rows:
        raise TextError(
            f"{source}: the tokenizer makes token {highest}, the model's embedding has {rows} rows: they do not belong "
            "together; give the checkpoint its own tokenizer"
        )


def _windows(tokens: list[tuple[int, ...]]) -> Windows:
    data = torch.tensor(tokens, dtype=torch.int64).numpy().astype("<i8").tobytes()
    return Windows(tuple(tokens), hashlib.sha256(data).hexdigest())


def deal_samples(windows: Windows, partition_samples: int, workers: int) -> list[list[Sample]]:
    """Give each worker a consecutive range of whole partitions."""
    samples = [Sample(index, tokens) for index, tokens in enumerate(windows.tokens)]
    partitions = -(-len(samples) // partition_samples)
    return [
        samples[start * partition_samples : stop * partition_samples]
        for start, stop in even_ranges(partitions, workers)
    ]
