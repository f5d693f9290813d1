from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from billhook.orchestrator import InputError
from billhook.orchestrator.calibration import bos_tokens, calibration_windows, evaluation_windows, read_text
from billhook.orchestrator.recipe import Recipe


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(llama)


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"samples": 5, "seqlen": 16, **options})


def test_windows_are_those_of_the_stated_draw(llama: Path, config: Any, tokenizer: Any, text_file: Path) -> None:
    windows = calibration_windows(recipe(calibration=str(text_file), seed=7), llama, config)
    tokens = tokenizer(text_file.read_text(), add_special_tokens=False).input_ids
    starts = torch.randint(0, len(tokens) - 17, (5,), generator=torch.Generator().manual_seed(7)).tolist()
    assert windows.tokens == tuple(tuple(tokens[start : start + 16]) for start in starts)
    data = b"".join(token.to_bytes(8, "little") for window in windows.tokens for token in window)
    assert windows.sha256 == hashlib.sha256(data).hexdigest()
    assert calibration_windows(recipe(calibration=str(text_file), seed=8), llama, config).sha256 != windows.sha256


def test_bos_starts_every_window_where_it_is_wanted(llama: Path, config: Any, text_file: Path) -> None:
    always = calibration_windows(recipe(calibration=str(text_file), bos="always"), llama, config)
    assert all(len(window) == 16 and window[0] == 510 for window in always.tokens)
    automatic = calibration_windows(recipe(calibration=str(text_file)), llama, config)
    assert not any(window[0] == 510 for window in automatic.tokens)  # this tokenizer adds none itself


def test_bos_is_automatic_when_the_tokenizer_adds_it() -> None:
    class AddsBos:
        bos_token_id = 3

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3, 9]}

    class HasNone(AddsBos):
        bos_token_id = None  # type: ignore[assignment]

    assert bos_tokens(AddsBos(), "auto") == (3,)
    assert bos_tokens(AddsBos(), "never") == ()
    assert bos_tokens(HasNone(), "auto") == ()
    with pytest.raises(InputError, match="--bos always: the tokenizer has no BOS"):
        bos_tokens(HasNone(), "always")


def test_evaluation_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer: Any, english: str) -> None:
    tokens = tokenizer(english[:5000], add_special_tokens=False).input_ids
    windows = evaluation_windows(tokenizer, english[:5000], 100, None, "auto", "x")
    assert [token for window in windows.tokens for token in window] == tokens[: len(tokens) // 100 * 100]
    with pytest.raises(InputError, match=r"--text x: \d+ tokens make \d+ windows of 100, 5000 were asked for"):
        evaluation_windows(tokenizer, english[:5000], 100, 5000, "auto", "x")


def test_random_tokens_cover_the_vocabulary(tmp_path: Path, config: Any) -> None:
    windows = calibration_windows(recipe(calibration="random", samples=200), tmp_path, config)
    seen = {token for window in windows.tokens for token in window}
    assert min(seen) == 0
    assert max(seen) == 511


def test_jsonl_documents_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ("one", "two")) + "\n\n")
    assert read_text(str(path), "body", 10) == "one\n\ntwo"
    with pytest.raises(InputError, match=r"line 1: has no field 'text'; name it with --field"):
        read_text(str(path), "text", 10)
    path.write_text('{"text": "one\u2028still one"}\n{"text": "two"}', encoding="utf-8")
    assert read_text(str(path), "text", 10) == "one\u2028still one\n\ntwo"
    for bad in ('{"text": null}', '{"text": "\\ud800"}'):
        path.write_text(bad)
        with pytest.raises(InputError, match="line 1: field 'text' holds"):
            read_text(str(path), "text", 10)
    path.write_text("{\n")
    with pytest.raises(InputError, match="line 1: is not a JSON object"):
        read_text(str(path), "text", 10)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_text(str(path), "text", 10)


def test_a_dataset_gives_as_much_text_as_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {number}", "other": 1}) for number in range(100)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    text = read_text(str(folder), "text", 60)
    assert text.startswith("document 0\n\ndocument 1\n\n")
    assert len(text) < 120
    with pytest.raises(InputError, match=r"rows have the fields .*text.*not 'body'"):
        read_text(str(folder), "body", 60)
    with pytest.raises(InputError, match="no such file, and no dataset of this name"):
        read_text("nobody/no-such-dataset", "text", 60)
