"""The ``billhook`` command: a thin skin over the Python interface."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as signatures
import json
import math
import signal
import sys
import typing
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from billhook.layerworkers.allocator import return_large_blocks
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.command import SETTERS, flag_of
from billhook.orchestrator.ending import ending_with_code
from billhook.orchestrator.interruption import GRACE_SECONDS, interruptible, is_ignored
from billhook.orchestrator.recipe import SAMPLE_KEYS, SOLVING_KEYS, Recipe, Resources, RunOptions

if TYPE_CHECKING:
    from billhook.orchestrator.driver import PruneResult

app = typer.Typer(
    name="billhook",
    help="Prune large language models that do not fit in memory.",
    no_args_is_help=True,
    rich_markup_mode=None,  # markup would read N:M: as an emoji
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hugging Face hub id.")]
Force = Annotated[bool, typer.Option("--force", help="Go on with other library versions than the run was begun with.")]
Grace = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="What the block in progress may still take after a signal.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML file of the options below.")]


def main() -> None:
    """Run the command line; see ``docs/cli.md`` for the exit codes."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if not is_ignored(number):
            signal.signal(number, _interrupt)
    return_large_blocks()
    app()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def with_run_options(command: Callable[..., None], without: Collection[str] = frozenset()) -> Callable[..., None]:
    """Give a command one option for each key of :class:`Recipe` and :class:`Resources`, passed on as ``given``.

    without: keys that the command has no option for.
    """
    parameters = [
        parameter
        for parameter in signatures.signature(command, eval_str=True).parameters.values()
        if parameter.name != "given"
    ]
    models = [(model, [name for name in model.model_fields if name not in without]) for model in (Recipe, Resources)]
    parameters += [_parameter(name, model) for model, names in models for name in names]

    def run(**arguments: Any) -> None:
        given = {key: arguments.pop(key) for _, names in models for key in names}
        command(**arguments, given=_given(given))

    run.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, model: type[BaseModel]) -> signatures.Parameter:
    field = model.model_fields[name]
    kind, flag = _option_type(field.annotation), flag_of(name)
    text = field.description or ""
    if field.default not in (None, (), PydanticUndefined):
        text += f" [default: {field.default}]"
    if name == "log_to":
        option = typer.Option(flag, metavar="TOOL", help=text + " May be repeated.")
    elif name in SETTERS:
        option = typer.Option(
            flag, metavar="REGEX=METHOD" if name == "methods" else "NAME=VALUE", help=text + " May be repeated."
        )
    elif _words(field.annotation):
        option = typer.Option(flag, metavar="|".join(["N", *_words(field.annotation)]), help=text)
    elif field.annotation == ByteSize | None:
        option = typer.Option(flag, metavar="SIZE", help=text)
    elif kind == bool | None:
        option = typer.Option(flag, help=text, show_default=False)
    else:
        option = typer.Option(flag, help=text)
    return signatures.Parameter(
        name, signatures.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _option_type(annotation: Any) -> Any:
    """Return what typer parses a recipe key as; None is always allowed and means: not given."""
    if annotation == ByteSize | None or _words(annotation):
        return str | None
    if typing.get_origin(annotation) in (dict, tuple):
        return list[str] | None
    if isinstance(annotation, UnionType):
        return annotation
    return annotation | None if isinstance(annotation, type) else typing.Optional[annotation]  # noqa: UP045 - Literal


def _words(annotation: Any) -> tuple[str, ...]:
    """Return the words that an option takes beside a number; none for an option of another kind."""
    kinds = typing.get_args(annotation)
    return typing.get_args(kinds[1]) if len(kinds) == 2 and typing.get_origin(kinds[1]) is Literal else ()


def _given(values: dict[str, Any]) -> RunOptions:
    """Return the options that were given, in the types that the recipe takes."""
    given = {key: value for key, value in values.items() if value is not None and value != []}
    for key, flag in SETTERS.items():
        if key in given:
            given[key] = dict(_name_and_value(flag, text) for text in given[key])
    for key in ("include", "exclude", "log_to"):
        if key in given:
            given[key] = tuple(given[key])
    for key, field in Resources.model_fields.items():
        words = _words(field.annotation)
        if words and key in given and given[key] not in words:
            try:
                given[key] = int(given[key])
            except ValueError as error:
                expected = ", ".join(["a number", *map(repr, words)])
                raise OptionError(f"--{key.replace('_', '-')} {given[key]}: expected one of {expected}") from error
    return typing.cast(RunOptions, given)


def _name_and_value(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        expected = "REGEX=METHOD, as mlp=sparsegpt" if flag == SETTERS["methods"] else "NAME=VALUE, as damping=0.01"
        raise OptionError(f"{flag} {text}: expected {expected}")
    return name.strip(), value.strip()


@app.command("plan")
@ending_with_code
@with_run_options
def plan_command(
    model: ModelArgument,
    recipe: RecipeFile = None,
    assume_device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Plan for workers with an a100, h100, b200 or cpu-core each, not for here."),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="What goes into or out of a worker on a node of its own, as 12GB/s."),
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Show every phase, placement and option, too.")] = False,
    json_output: Json = False,
    *,
    given: Any,
) -> None:
    """Say what prune would do: matches, memory, bytes, time. Touches no weights."""
    from billhook.orchestrator.pages import show
    from billhook.orchestrator.plan_page import plan_page
    from billhook.orchestrator.planning import plan
    from billhook.orchestrator.printing import plan_as_json

    made = plan(model, recipe=recipe, assume_device=assume_device, bandwidth=bandwidth, **given)
    if json_output:
        _print_json(plan_as_json(made))
    else:
        show(plan_page(made, details))


@app.command("prune")
@ending_with_code
@with_run_options
def prune_command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder or hub id.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder of the sparse checkpoint.")
    ] = None,
    recipe: RecipeFile = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="OUT", help="Go on with the run in OUT; needs no MODEL and no options."),
    ] = None,
    from_block: Annotated[
        int | None, typer.Option(min=0, help="Keep the blocks before this one and redo the others.")
    ] = None,
    force: Force = False,
    grace: Grace = GRACE_SECONDS,
    json_output: Json = False,
    *,
    given: Any,
) -> None:
    """Prune a model into OUT, or go on with an interrupted run of the same plan."""
    from billhook.orchestrator import driver
    from billhook.orchestrator.progress import shown_progress

    if (resume is None) == (model is None) or (resume is None) == (output is None):
        raise OptionError("prune: expected either MODEL and --output OUT, or --resume OUT")
    if resume is not None and recipe is not None:
        raise OptionError("--resume: takes no --recipe; the run's own is in its journal")
    # Standard output is ours alone: what the tools of --log-to print goes beside it.
    with interruptible(grace) as interruption, redirect_stdout(sys.stderr), shown_progress() as progress:
        way: Any = {"from_block": from_block, "force": force, "progress": progress, "interruption": interruption}
        if resume is not None:
            result = driver.resume(resume, **way, **given)
        else:
            assert model is not None
            assert output is not None
            result = driver.prune(model, output, recipe=recipe, **way, **given)
    _print_result(result, json_output)


def _print_result(result: PruneResult, as_json: bool) -> None:
    from billhook.orchestrator.units import gibibytes

    if as_json:
        _print_json(
            {
                "sparsity": result.sparsity,
                "seconds": result.seconds,
                "peak_bytes": result.peak_bytes,
                "planned_bytes": result.planned_bytes,
                "budgets": dataclasses.asdict(result.budgets) if result.budgets else None,
                "output": str(result.output),
                "blocks": result.blocks,
                "already_finished": result.already_finished,
                "linears": [dataclasses.asdict(linear) for linear in result.linears],
            }
        )
        return
    if result.budgets is None:
        print(f"{result.output}: this run had already finished; nothing was done")
    else:
        print(
            f"{result.output}: {len(result.linears)} linears in {result.blocks} blocks at sparsity "
            f"{result.sparsity:.4f}, {result.seconds:.1f} s, peak memory {gibibytes(result.peak_bytes['ram'])} "
            f"(planned {gibibytes(result.planned_bytes['ram'])}, budget {gibibytes(result.budgets.ram)})"
        )


@app.command("collect")
@ending_with_code
@partial(with_run_options, without=SOLVING_KEYS)
def collect_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the statistics.")],
    recipe: RecipeFile = None,
    force: Force = False,
    grace: Grace = GRACE_SECONDS,
    json_output: Json = False,
    *,
    given: Any,
) -> None:
    """Keep the statistics of a dense model's linears in DIR, from which solve makes any number of checkpoints."""
    from billhook.orchestrator.driver import collect
    from billhook.orchestrator.progress import shown_progress
    from billhook.orchestrator.units import gibibytes

    with interruptible(grace) as interruption, redirect_stdout(sys.stderr), shown_progress() as progress:
        way: Any = {"force": force, "progress": progress, "interruption": interruption}
        done = collect(model, output, recipe=recipe, **way, **given)
    if json_output:
        _print_json(dataclasses.asdict(done))
    elif done.already_finished:
        print(f"{done.output}: this run had already finished; nothing was done")
    else:
        print(
            f"{done.output}: {gibibytes(done.size_bytes)} of statistics for {done.linears} linears, "
            f"{done.seconds:.1f} s, peak memory {gibibytes(done.peak_bytes['ram'])}"
        )


@app.command("solve")
@ending_with_code
@partial(with_run_options, without=SAMPLE_KEYS)
def solve_command(
    collected: Annotated[str, typer.Argument(metavar="DIR", help="Folder that collect wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the sparse checkpoint.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model; default: where it was when collected.")
    ] = None,
    recipe: RecipeFile = None,
    force: Force = False,
    grace: Grace = GRACE_SECONDS,
    json_output: Json = False,
    *,
    given: Any,
) -> None:
    """Prune into OUT by statistics that collect wrote, without running a sample."""
    from billhook.orchestrator.driver import solve
    from billhook.orchestrator.progress import shown_progress

    with interruptible(grace) as interruption, redirect_stdout(sys.stderr), shown_progress() as progress:
        way: Any = {"force": force, "progress": progress, "interruption": interruption}
        result = solve(collected, output, model=model, recipe=recipe, **way, **given)
    _print_result(result, json_output)


@app.command("allocate")
@ending_with_code
@with_run_options
def allocate_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file of the table.")],
    recipe: RecipeFile = None,
    json_output: Json = False,
    *,
    given: Any,
) -> None:
    """Say what each linear would lose, in a file that prune's --allocation reads."""
    from billhook.orchestrator.allocating import allocate
    from billhook.orchestrator.printing import allocation_as_text
    from billhook.orchestrator.progress import shown_progress

    with shown_progress() as progress:
        made = allocate(model, output, recipe=recipe, progress=progress, **given)
    print(output.read_text() if json_output else allocation_as_text(made))


@app.command("status")
@ending_with_code
def status_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Output of a running or ended prune.")],
    json_output: Json = False,
) -> None:
    """Show how far a run is: while it goes on, or after it ended in whatever way."""
    from billhook.orchestrator.pages import show
    from billhook.orchestrator.run_status import status, status_page

    found = status(output)
    if json_output:
        _print_json(dataclasses.asdict(found))
    else:
        show(status_page(found))


@app.command("verify")
@ending_with_code
def verify_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Finished output of prune.")],
    against: Annotated[str | None, typer.Option(help="Source model; default: where it was when it was pruned.")] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Compare a few prompts, streamed, in transformers, and of the source.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="What the prompts are taken from; default: the calibration text.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Re-read a finished checkpoint and check every promise that can be checked."""
    from billhook.orchestrator.progress import shown_progress
    from billhook.orchestrator.verification import verify

    if text is not None and not logits:
        raise OptionError("--text: is for the prompts of --logits, which was not given")
    with shown_progress() if logits else contextlib.nullcontext() as progress:
        found = verify(output, against=against, logits=logits, text=text, progress=progress)
    if json_output:
        _print_json(dataclasses.asdict(found))
    else:
        for problem in found.problems:
            print(f"{problem.name}: {problem.reason}")
        compared = f"compared with {found.against}" if found.against else "source gone or changed: not compared with it"
        if found.logits is not None:
            print(
                f"logits     {len(found.logits.streamed_nats)} prompts of {found.logits.seqlen} tokens, streamed and "
                f"in transformers: {found.logits.difference_nats:.5f} nats per token apart at most, "
                f"{found.logits.tolerance_nats} are allowed"
            )
            if found.logits.against is not None:
                print(
                    f"           from the source: top-1 agreement {found.logits.against.agreement:.2%}, KL divergence "
                    f"{found.logits.against.divergence:.5f} nats per token"
                )
        print(f"{output}: {'ok' if found.ok else 'NOT OK'}, {found.checked_tensors} tensors, {compared}")
    if not found.ok:
        raise typer.Exit(1)


@app.command("report")
@ending_with_code
def report_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Output of a prune, in whatever state.")],
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: OUT/billhook/report.html.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What 'eval --json' printed, of MODEL and of OUT. May be repeated."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write what a run did and took to one HTML file, which loads nothing."""
    from billhook.orchestrator.reporting import report

    written = report(output, file, evaluations=evaluation or ())
    if json_output:
        _print_json(dataclasses.asdict(written))
    else:
        print(written.path)


@app.command("inspect")
@ending_with_code
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder, hub id or .safetensors file.")],
    json_output: Json = False,
) -> None:
    """Show sparsity and pattern of every tensor of a safetensors checkpoint."""
    from billhook.orchestrator.inspection import inspect
    from billhook.orchestrator.printing import inspection_as_text

    found = inspect(checkpoint)
    if json_output:
        _print_json(dataclasses.asdict(found))
    else:
        print(inspection_as_text(found))


@app.command("eval")
@ending_with_code
def eval_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Model folder or hub id.")],
    text: Annotated[str | None, typer.Option(help="Text file, JSONL file or Hugging Face dataset.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Reference, as the dense model: KL divergence and agreement.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness; it holds the whole model.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own, as the harness's YAML files.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; default min(2048, context).")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows; default: all that the text has.")] = None,
    field: Annotated[str, typer.Option(help="Field that holds the text, in JSONL files and datasets.")] = "text",
    bos: Annotated[Literal["auto", "always", "never"], typer.Option(help="Start every window with BOS.")] = "auto",
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="Compute dtype.")] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per worker.")] = 1,
    workers: Annotated[str, typer.Option(metavar="N|auto", help="Workers.")] = "auto",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: start one here.")] = None,
    vram: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU memory that a worker may use.")] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of all processes on a node together.")] = None,
    scratch: Annotated[str | None, typer.Option(help="Folder for what memory has no room for.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    json_output: Json = False,
) -> None:
    """Compute a checkpoint's perplexity on a text, one block in memory at a time; or run tasks on it."""
    from billhook.orchestrator.evaluation import evaluate
    from billhook.orchestrator.harness import prepare_tasks, run_tasks
    from billhook.orchestrator.printing import evaluation_as_text, tasks_as_text
    from billhook.orchestrator.progress import shown_progress

    if text is None and tasks is None:
        raise OptionError("eval: expected --text FILE, --tasks NAME, or both")
    if text is None and against is not None:
        raise OptionError("--against: is compared on a text; give --text, too")
    if tasks is None and task_folder is not None:
        raise OptionError("--task-folder: say which of its tasks, with --tasks")
    same: Any = {"dtype": dtype, "device": device, "vram": vram, "ram": ram, "trust_remote_code": trust_remote_code}
    document: dict[str, Any] = {}
    prepared = None if tasks is None else prepare_tasks(checkpoint, tasks.split(","), task_folder=task_folder, **same)
    if text is not None:
        with shown_progress() as progress:
            result = evaluate(
                checkpoint,
                text,
                against=against,
                seqlen=seqlen,
                windows=windows,
                field=field,
                bos=bos,
                threads=threads,
                workers=_given({"workers": workers})["workers"],
                address=address,
                scratch=scratch,
                progress=progress,
                **same,
            )
        document |= dataclasses.asdict(result)
        if not json_output:
            print(evaluation_as_text(result))
    if prepared is not None:
        document["tasks"] = run_tasks(prepared)
        if not json_output:
            print(tasks_as_text(document["tasks"]))
    if json_output:
        _print_json(_finite(document))


@app.command("methods")
@ending_with_code
def methods_command(json_output: Json = False) -> None:
    """List the pruning methods and their options."""
    from billhook.orchestrator.printing import methods_as_json, methods_as_text

    if json_output:
        _print_json(methods_as_json())
    else:
        print(methods_as_text())


@app.command("schema")
@ending_with_code
def schema_command() -> None:
    """Print the JSON schema of recipe files, for editors that check YAML."""
    from billhook.orchestrator.recipe_schema import recipe_schema

    _print_json(recipe_schema())


def _finite(document: Any) -> Any:
    """Return a document with null in place of numbers that JSON does not have."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=str, allow_nan=False))
