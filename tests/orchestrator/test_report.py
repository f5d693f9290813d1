"""The report of a run: whatever its state, whoever named its tensors."""

from __future__ import annotations

import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reports import HOSTILE, hostile, interrupted, troubled

from billhook.orchestrator import InputError, cli, driver, prune, report, verify
from billhook.orchestrator.command import as_line, prune_words
from billhook.orchestrator.events import Event, Warned
from billhook.orchestrator.history import read_history
from billhook.orchestrator.output import locked, read_manifest
from billhook.orchestrator.recipe import RunOptions, read_options
from billhook.orchestrator.reporting.decisions import decisions
from billhook.orchestrator.reporting.plots import error_plot, sparsity_plot, time_plot
from billhook.orchestrator.reporting.record import kind_of, read_record


@pytest.fixture(scope="module")
def out(llama: Path, text_file: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(
        llama, tmp_path_factory.mktemp("report") / "out", method="sparsegpt", sparsity=0.5, calibration=str(text_file),
        samples=4, seqlen=32, exclude=("down_proj",), ram="8GiB", workers=1,
    ).output  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: elements, the text that is shown, and the data that the script reads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.facts: dict[str, Any] = {}
        self._inside, self._data = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)
        self.tags.append(tag)
        self._inside, self._data = (str(dict(attrs).get("id")) if tag == "script" else tag), ""

    def handle_endtag(self, tag: str) -> None:
        if self._inside == "facts":
            self.facts = json.loads(self._data)
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self._data += data
        if self._inside not in ("facts", "None", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_a_finished_run_has_its_report(out: Path, llama: Path, text_file: Path) -> None:
    page = Page(out / "billhook" / "report.html")
    assert "3 of 3 blocks done" in page.text
    assert "finished" in page.text
    assert "50.0% of the weights pruned are zero 18 linears pruned" in page.text
    assert f"{llama} " in page.text
    assert "sparsegpt (block=128, damping=0.01)" in page.text
    assert f"4 samples of 32 tokens from {text_file}, seed 0" in page.text
    assert "8.00 GiB allowed" in page.text
    assert "planned, 8.00 GiB" in page.text
    assert f"billhook prune {llama} -o {out} --method sparsegpt --sparsity 0.5 --calibration {text_file}" in page.text
    table, blocks = page.facts["tables"]
    assert len(table["rows"]) == 18
    assert [row[0] for row in blocks["rows"]] == [0, 1, 2]
    for linear, row in zip(read_manifest(out)["linears"], table["rows"], strict=True):
        told = dict(zip([column["title"] for column in table["columns"]], row, strict=True))
        assert told["linear"] == linear["name"]
        assert told["error"] == linear["error"]
        assert told["zeros"] == linear["zeros"]


def test_plots_show_what_the_record_holds(out: Path) -> None:
    record = read_record(out)
    kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    errors, sparsities, times = error_plot(record.linears), sparsity_plot(record.linears), time_plot(record)
    assert errors is not None and sparsities is not None and times is not None  # noqa: PT018 - for mypy
    for plot in (errors, sparsities):
        assert plot.data[0]["y"] == kinds
        assert plot.data[0]["x"] == [0, 1, 2]
    assert {value for row in sparsities.data[0]["z"] for value in row} == {0.5}
    worst = max(record.linears, key=lambda each: each.came_out.error)
    shown = {
        (kind, block): z for kind, row in zip(kinds, errors.data[0]["z"], strict=True) for block, z in enumerate(row)
    }
    assert max(shown, key=lambda place: shown[place]) == (worst.kind, worst.block)
    spent = [sum(trace["y"][block] for trace in times.data if trace["type"] == "bar") for block in range(3)]
    assert spent == pytest.approx([record.block_seconds[block] for block in range(3)], abs=0.05)
    assert [trace["name"] for trace in times.data][-1] == "planned"


def test_the_report_is_outside_what_is_proven(out: Path) -> None:
    written = out / "billhook" / "report.html"
    assert "report.html" not in json.dumps(read_manifest(out))
    written.write_text("gone")
    assert verify(out).ok
    assert report(out).path == written
    assert "3 of 3 blocks done" in Page(written).text


def test_an_interrupted_run_has_a_report_of_what_is_done(out: Path, tmp_path: Path) -> None:
    page = Page(report(interrupted(out, tmp_path / "run")).path)
    assert "1 of 3 blocks done" in page.text
    assert "This run is not finished: it was interrupted" in page.text
    assert f"billhook prune --resume {tmp_path / 'run'}" in page.text
    assert len(page.facts["tables"][0]["rows"]) == 6


def test_a_run_that_goes_on_or_has_only_begun_has_a_report(out: Path, tmp_path: Path) -> None:
    run = interrupted(out, tmp_path / "run")
    with locked(run):
        assert "running 1 of 3 blocks done" in Page(report(run).path).text
    journal = run / "billhook" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:1]))
    (run / "billhook" / "events.jsonl").unlink()
    page = Page(report(run, tmp_path / "early.html").path)
    assert page.facts == {"plots": [], "tables": []}
    assert "No block is done yet" in page.text
    journal.unlink()
    with pytest.raises(InputError, match="not got as far as a plan"):
        report(run)


def test_decisions_are_told(out: Path, tmp_path: Path) -> None:
    run = troubled(out, tmp_path / "run")
    told = {decision.title.partition(" with less")[0]: decision.details for decision in decisions(read_record(run))}
    damped = "Damping raised for 3 of 18 linears: their Gram matrix could not be factorised"
    assert told[damped][0] == "model.layers.0.self_attn.q_proj.weight: 0.01 → 0.1 → 1"
    fallen = "3 linears of experts that few calibration tokens are sent to were fitted to all tokens of their layer"
    assert told[fallen][0] == "model.layers.0.self_attn.k_proj.weight: 3 tokens"
    assert told["Block 1 was lost with a worker, and tried again"] == ("worker 1 died: SIGKILL",)
    assert told["Failed (RunError) after 1 blocks"] == ("the disk is full",)
    assert "Gone on with after 1 blocks, by process 7 on spare" in told
    page = Page(report(run).path)
    assert "worker 1 died: SIGKILL" in page.text


def test_hostile_names_are_only_text(out: Path, tmp_path: Path) -> None:
    page = Page(report(hostile(out, tmp_path / "run")).path)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert "{{ 7 * 7 }}" in page.text
    shown = HOSTILE.replace("\ud800", "\\ud800")
    assert page.text.count(shown) >= 5
    assert page.facts["tables"][0]["rows"][0][0].endswith(HOSTILE)
    for plot in page.facts["plots"][:2]:
        texts = [text for row in plot["data"][0]["text"] for text in row]
        assert all("<img" not in text for text in [*texts, *plot["data"][0]["y"]])
        assert html.escape(HOSTILE) in texts[0]


def document(path: Path, **changed: Any) -> Path:
    content = {"perplexity": 20.0, "windows": 4, "tokens": 124, "seqlen": 32, "checkpoint": "", "text": "wiki.txt"}
    path.write_text(json.dumps({**content, **changed}))
    return path


def test_perplexities_are_compared_where_they_can_be(out: Path, llama: Path, tmp_path: Path) -> None:
    dense = document(tmp_path / "dense.json", checkpoint=str(llama))
    pruned = document(tmp_path / "pruned.json", checkpoint=str(out), perplexity=50.0)
    page = Page(report(out, tmp_path / "report.html", evaluations=[pruned, dense]).path)
    assert "20 dense, 50 pruned : 2.5 times as large, on 4 windows of 32 tokens of wiki.txt" in page.text
    assert "20 → 50" in page.text
    other = document(tmp_path / "other.json", checkpoint=str(out), perplexity=50.0, seqlen=64)
    for pair in ([dense, other], [dense, document(tmp_path / "stranger.json", checkpoint="org/name")], [pruned]):
        assert "they cannot be compared" in Page(report(out, tmp_path / "report.html", evaluations=pair).path).text
    infinite = document(tmp_path / "infinite.json", checkpoint=str(out), perplexity=None)
    page = Page(report(out, tmp_path / "report.html", evaluations=[dense, infinite]).path)
    assert "20 dense, infinite pruned" in page.text
    against = {"reference": str(llama), "perplexity": 25.0, "divergence": 0.125, "agreement": 0.75, "more": 1}
    both = document(tmp_path / "both.json", checkpoint=str(out), perplexity=50.0, against=against)
    page = Page(report(out, tmp_path / "report.html", evaluations=[both]).path)
    assert "25 dense, 50 pruned : 2 times as large" in page.text
    assert "KL divergence 0.125 nats per token, the same likeliest token for 75.0% of them" in page.text
    stranger = document(tmp_path / "both.json", checkpoint=str(out), against={**against, "reference": "org/name"})
    assert "they cannot be compared" in Page(report(out, tmp_path / "r.html", evaluations=[stranger]).path).text
    assert "billhook eval" in Page(report(out, tmp_path / "report.html").path).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("perplexity 20", "Invalid JSON"),
        ('{"perplexity": 20}', "checkpoint: Field required"),
        ("[]", "expected what 'billhook eval CKPT --text FILE --json' prints"),
        ('{"perplexity": -1, "checkpoint": "", "text": "", "windows": 1, "tokens": 1, "seqlen": 1}', "perplexity: "),
    ],
)
def test_what_is_no_evaluation_is_refused(out: Path, tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "evaluation.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=f"--evaluation {re.escape(str(file))}: .*{re.escape(message)}"):
        report(out, tmp_path / "report.html", evaluations=[file])
    assert not (tmp_path / "report.html").exists()


def test_where_a_report_cannot_be_written(out: Path, tmp_path: Path) -> None:
    for file in (out / "report.html", out / "billhook" / "journal.jsonl"):
        with pytest.raises(InputError, match="is in the output"):
            report(out, file)
    for file in (tmp_path, tmp_path / "none" / "report.html"):
        with pytest.raises(InputError, match="cannot be written"):
            report(out, file)
    with pytest.raises(InputError, match="no billhook run"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert verify(out).ok


def test_a_report_that_cannot_be_written_does_not_fail_the_run(llama: Path, tmp_path: Path, ray_cluster: None) -> None:
    out, told = tmp_path / "out", list[Event]()

    def watch(event: Event) -> None:
        told.append(event)
        if (out / "billhook").is_dir():
            (out / "billhook" / "report.html").mkdir(exist_ok=True)

    assert prune(llama, out, method="magnitude", workers=1, progress=watch).sparsity == 0.5
    warned = [event.message for event in told if isinstance(event, Warned)]
    assert any(f"'billhook report {out}' tries again: " in message for message in warned)
    assert verify(out).ok


def test_a_notebook_shows_the_report_in_a_frame(out: Path, tmp_path: Path) -> None:
    frame = report(out, tmp_path / "report.html")._repr_html_()
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts" srcdoc="([^"]*)" title="[^"]*" style="[^"]*"></iframe>', frame
    )
    assert found is not None
    assert html.unescape(found[1]) == (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "admm", "sparsity": 0.7, "options": {"ridge": "0.3", "iterations": "20"}},
        {"pattern": "2:4", "include": ("self attn", "mlp'"), "exclude": ("k_proj",), "trust_remote_code": True},
        {"allocation": "owl", "allocation_options": {"multiple": "7.0"}, "calibration": "/a b/text.txt", "seqlen": 64},
        {
            "workers": 3,
            "ram": "16GiB",
            "disk": "500MB",
            "vram": 123_456_789,
            "scratch": "/tmp/x",
            "keep_inputs": "never",
        },
    ],
)
def test_the_command_asks_for_the_same_again(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, resources = read_options(None, options)
    asked = {
        "model": "org/a model",
        "recipe": recipe.model_dump(mode="json"),
        "resources": resources.model_dump(mode="json"),
    }
    words = prune_words(json.loads(json.dumps(asked)), "some/out", from_block=2)
    assert as_line(words).startswith("billhook prune 'org/a model' -o some/out --from-block 2")
    called: dict[str, Any] = {}

    def remember(model: str, output: Path, **given: Any) -> None:
        called.update(given, model=model, output=output)
        raise InputError("enough")

    monkeypatch.setattr(driver, "prune", remember)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.main()
    assert "enough" in capsys.readouterr().err
    assert (called.pop("model"), called.pop("output"), called.pop("from_block")) == ("org/a model", Path("some/out"), 2)
    given = {key: called[key] for key in called if key in {**asked["recipe"], **asked["resources"]}}
    assert read_options(None, given) == (recipe, resources)


def test_the_journals_own_command_is_a_command(out: Path) -> None:
    words = prune_words(read_history(out).decided[-1].asked, str(out))
    assert words[-2:] == ["--ram", "8GiB"]
    assert words[words.index("--exclude") + 1] == "down_proj"


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.12.up_proj.weight", 3, "mlp.experts.*.up_proj"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", 0, "mlp.experts.*.up_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj[5]", 3, "mlp.experts.gate_up_proj[*]"),
        ("h.11.attn.c_attn.weight", 11, "attn.c_attn"),
        ("3.q.weight", 3, "q"),
        ("strange", 3, "strange"),
    ],
)
def test_linears_at_the_same_place_are_of_one_kind(name: str, block: int, kind: str) -> None:
    assert kind_of(name, block) == kind


def test_the_command_says_where_the_report_is(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in (([str(out)], 0), ([str(tmp_path)], 2)):
        target = tmp_path / "report.html"
        monkeypatch.setattr(sys, "argv", ["billhook", "report", *arguments, "-o", str(target), "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
        if not code:
            assert json.loads(capsys.readouterr().out) == {"path": str(target)}
