"""The command line: JSON documents, exit codes, help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator import cli, verify
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions


def run(
    *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["billhook", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_imports_neither_torch_nor_ray() -> None:
    code = """
import sys
from billhook.orchestrator import cli
sys.argv = ["billhook", "prune", "--help"]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
print("heavy:", sorted({"torch", "ray", "transformers", "numpy"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines()[-1] == "heavy: []"
    assert "--calibration" in run.stdout
    assert "N weights kept of every M" in run.stdout.replace("\n", " ").replace("  ", " ") or "N:M" in run.stdout


def test_every_key_of_recipe_and_resources_is_an_option_and_a_keyword() -> None:
    fields = {**Recipe.model_fields, **Resources.model_fields}
    assert set(RunOptions.__annotations__) == set(fields)
    assert all(field.description for field in fields.values())


def test_plan_prints_one_json_document(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(
        "plan", llama, "--json", "--pattern", "2:4", "--exclude", "q_proj", "--exclude", "k_proj",
        capsys=capsys, monkeypatch=monkeypatch,
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document["blocks"] == 3
    assert len(document["linears"]) == 15
    assert len(document["skipped"]) == 6
    assert set(document["peak_bytes"]) == {"vram", "ram", "disk"}
    assert document["fits"] is True
    for key in ("bytes_read", "bytes_written", "flops", "seconds"):
        assert document[key] > 0
    code, out, _ = run("plan", llama, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    assert "21 linears" in out


def test_a_recipe_file_is_overridden_by_options(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: admm\nsparsity: 0.7\noptions: {ridge: 0.3}\ninclude: [self_attn]\nworkers: 1\n")
    _, out, _ = run(
        "plan", llama, "--recipe", recipe, "--json", "--sparsity", "0.6", capsys=capsys, monkeypatch=monkeypatch
    )
    document = json.loads(out)
    assert (document["method"], document["sparsity"], document["options"]["ridge"]) == ("admm", 0.6, 0.3)
    assert len(document["linears"]) == 12
    recipe.write_text("metod: admm\n")
    code, out, err = run("plan", llama, "--recipe", recipe, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (2, "")
    assert "did you mean 'method'" in err


def test_the_recipe_of_the_documentation_works(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example
    (tmp_path / "recipe.yaml").write_text(example[1].replace("2048", "64"))
    code, _, err = run("plan", llama, "--recipe", tmp_path / "recipe.yaml", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err


def test_methods_lists_name_source_and_statistics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run("methods", "--json", capsys=capsys, monkeypatch=monkeypatch)
    rows = json.loads(out)
    assert {row["kind"] for row in rows} == {"method", "refinement", "allocator"}
    methods = {row["name"]: row for row in rows if row["kind"] == "method"}
    assert set(methods) >= {"magnitude", "wanda", "sparsegpt", "admm", "alps", "thanos", "ria"}
    assert {row["name"] for row in rows if row["kind"] == "refinement"} >= {"refit", "swaps"}
    assert methods["wanda"]["statistics"] == ["column squares"]
    assert methods["sparsegpt"]["options"]["damping"] == 0.01
    assert all(re.search(r"\b(19|20)\d\d\b", method["source"]) for method in methods.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "no-such-model", "-o", "out"], "no such folder"),
        (["eval", "no-such-model", "--text", "x.txt"], "no such folder"),
        (["eval", "no-such-model"], "expected --text FILE, --tasks NAME, or both"),
        (["eval", "no-such-model", "--tasks", "piqa", "--against", "x"], "--against: is compared on a text"),
        (["eval", "no-such-model", "--text", "x.txt", "--task-folder", "x"], "--task-folder: say which"),
        (["inspect", "no-such-model"], "no such folder"),
        (["verify", "no-such-output"], "no billhook run"),
        (["prune", "no-such-model"], "--output"),
        (["prune", "m", "-o", "o", "--workers", "many"], "--workers many"),
        (["prune", "m", "-o", "o", "--set", "damping"], "expected NAME=VALUE"),
        (["prune", "m", "-o", "o", "--bos", "perhaps"], "perhaps"),
        (["nonesuch"], "nonesuch"),
    ],
)
def test_wrong_requests_exit_with_2_and_say_why_on_standard_error(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_an_interrupt_exits_with_130(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("billhook.orchestrator.driver.make_request", interrupt)
    code, out, err = run("prune", llama, "-o", "out", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (130, "")
    assert err == "billhook: interrupted\n"


def test_the_whole_command_in_a_process_of_its_own(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray is started, used by two workers and stopped; prune, verify, inspect and eval print one document each."""

    def here(*arguments: object) -> Any:
        code, text, err = run(*arguments, "--json", capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, err
        return json.loads(text)

    def billhook(*arguments: object) -> Any:
        command = [sys.executable, "-m", "billhook.orchestrator", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    out = tmp_path / "out"
    pruned = billhook(
        "prune", llama, "-o", out, "--method", "wanda", "--calibration", text_file, "--samples", 8, "--seqlen", 32,
        "--workers", 2,
    )  # fmt: skip
    assert pruned["output"] == str(out)
    assert pruned["sparsity"] == 0.5
    assert pruned["seconds"] > 0
    assert pruned["peak_bytes"]["ram"] > 2**28
    assert here("verify", out)["ok"] is True
    tensors = {tensor["name"]: tensor for tensor in here("inspect", out)["tensors"]}
    assert tensors["model.layers.0.mlp.up_proj.weight"]["sparsity"] == 0.5
    evaluated = billhook("eval", out, "--text", text_file, "--seqlen", 64, "--windows", 4, "--workers", 1)
    assert evaluated["perplexity"] > 1
    assert (evaluated["windows"], evaluated["tokens"]) == (4, 252)


def test_verify_exits_with_1_when_it_finds_problems(
    llama: Path, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from billhook.orchestrator import prune

    out = prune(llama, tmp_path / "out", method="magnitude", workers=1).output
    assert verify(out).ok
    (out / "config.json").write_text("{}")
    code, text, _ = run("verify", out, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert json.loads(text)["problems"][0] == {
        "name": "config.json",
        "reason": "its sha256 differs from the manifest's",
    }


def test_a_running_cluster_is_joined_and_left_running(
    llama: Path, text_file: Path, tmp_path: Path, cluster_environment: dict[str, str]
) -> None:
    import ray

    command = [
        sys.executable, "-m", "billhook.orchestrator", "prune", str(llama), "-o", "out", "--method", "wanda",
        "--calibration", str(text_file), "--samples", "8", "--seqlen", "32", "--workers", "2", "--json",
        "--address", cluster_environment["GCS"],
    ]  # fmt: skip
    environment = {**os.environ, **cluster_environment}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "out").ok
    assert ray.cluster_resources()["CPU"] == 4
