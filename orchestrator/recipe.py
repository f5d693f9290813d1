"""What a user asks for: the recipe (all that bytes depend on) and the resources (all that they do not)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from billhook.layerworkers.errors import OptionError, nearest
from billhook.orchestrator.paths import user_path

Value = bool | int | float | str

SOLVING_KEYS = (
    *("method", "methods", "options", "sparsity", "pattern", "allocation", "allocation_options"),
    *("fit", "correction", "reconstruct", "reconstruct_rate", "collected"),
)
"""Keys that mean nothing where statistics are collected."""

SAMPLE_KEYS = (
    *("calibration", "collected", "field", "samples", "seqlen", "seed", "bos", "fit", "correction"),
    *("reconstruct", "reconstruct_rate", "partition_samples", "route", "expert_tokens", "expert_fallback"),
    *("activations", "intermediates", "statistics", "keep_inputs"),
)
"""Keys that mean nothing where statistics that were collected are solved on."""

SIZE_WITH_UNIT = r"\s*\d+(\.\d+)?\s*[kKmMgGtTpP][iI]?[bB]?\s*"


class Recipe(BaseModel):
    """Everything asked for that decides the bytes of the output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("auto", description="Pruning method: see 'billhook methods'.")
    sparsity: float | None = Field(None, description="Share of weights to remove, in [0, 1); default 0.5.")
    pattern: str = Field(
        "unstructured", description="'unstructured', or N:M: N weights kept of every M, as 2:4; fixes the sparsity."
    )
    allocation: str = Field(
        "uniform",
        description="What each linear loses of it: an allocator (see 'billhook methods'), or a file of 'allocate'.",
    )
    allocation_options: dict[str, Value] = Field(
        default_factory=dict, description="The allocator's own options, as spread=0.1."
    )
    options: dict[str, Value] = Field(default_factory=dict, description="The method's own options, as damping=0.01.")
    methods: dict[str, str] = Field(
        default_factory=dict,
        description="Other methods, for the linears in whose name on disk a regex is found, as 'mlp=sparsegpt'; of "
        "several the first that is.",
    )
    calibration: str | None = Field(
        None, description="Text file, JSONL file, Hugging Face dataset (NAME[:CONFIG[:SPLIT]]), or 'random'."
    )
    collected: str | None = Field(
        None, description="Folder of 'collect', whose statistics are solved on instead; no samples are run then."
    )
    field: str = Field("text", description="Field that holds the text, in JSONL files and datasets.")
    samples: int = Field(128, ge=1, description="Calibration samples.")
    seqlen: int | None = Field(None, ge=2, description="Tokens per sample; default min(2048, the model's context).")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the calibration draw.")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="Start every sample with BOS: auto does so when the tokenizer does."
    )
    fit: Literal["auto", "lockstep", "dense-block"] = Field(
        "auto", description="Inputs that a linear is fitted to; auto is the method's own choice."
    )
    correction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of what earlier linears got wrong that a linear's target takes back, by a dense stream run "
        "beside; default the method's own.",
    )
    reconstruct: int = Field(
        0,
        ge=0,
        description="Passes over the samples in which what is kept of a block is tuned, by gradients, so that its "
        "output comes near the dense model's.",
    )
    reconstruct_rate: float = Field(
        0.003,
        gt=0,
        lt=1,
        description="What the first of these steps changes, relative to the size of a linear's weights.",
    )
    route: Literal["router", "all"] = Field(
        "router", description="Tokens that an expert is fitted to: those that the router sends there, or all."
    )
    expert_tokens: float = Field(
        1.0, ge=0, description="Tokens that an expert needs for each channel of its widest input, to be fitted to them."
    )
    expert_fallback: Literal["pool", "magnitude", "dense"] = Field(
        "pool", description="With fewer: fit it to all tokens of its layer, prune it by magnitude, or leave it dense."
    )
    include: tuple[str, ...] = Field(
        (), description="Only linears whose name on disk matches one of these regexes; each must match."
    )
    exclude: tuple[str, ...] = Field(
        (), description="No linear whose name on disk matches one of these regexes; each must match."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Compute dtype; auto is the checkpoint's (float32 for float16 on CPU)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    threads: int = Field(1, ge=1, description="CPU threads per worker; another number, other last bits.")
    partition_samples: int = Field(4, ge=1, description="Consecutive samples whose statistics are summed together.")
    partition_rows: int | None = Field(
        None, ge=16, description="Rows of a linear in one product; default 256 on CPU, 2048 on CUDA."
    )
    trust_remote_code: bool = Field(False, description="Run model code that the checkpoint brings along.")

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError('YAML reads N:M without quotes as a number; write it in quotes, as "2:4"')
        return value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Resources(BaseModel):
    """Where a run happens and who is told of it: no byte of the output depends on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int | Literal["auto"] = Field("auto", description="Workers; auto: one per GPU, or per CPU core.")
    address: str | None = Field(
        None, description="Ray cluster to join ('auto', HOST:PORT); default: 'local', start one here."
    )
    vram: ByteSize | None = Field(
        None,
        description="GPU memory that a worker may use, as 20GiB; default 90 % of the GPU's. "
        "On a CPU, the part of RAM that stands for it; default no limit.",
    )
    ram: ByteSize | None = Field(
        None,
        description="Memory that all processes on a node may use together, as 16GiB; "
        "default 85 % of the machine's, or of its cgroup's limit.",
    )
    disk: ByteSize | None = Field(
        None,
        description="Disk that output and scratch may use together; default what is free there, less 256 MiB.",
    )
    scratch: str | None = Field(
        None,
        description="Folder for what memory has no room for, of no use after the run; default: in the output.",
    )
    activations: Literal["auto", "device", "ram", "disk"] = Field(
        "auto", description="Where hidden states wait between blocks; auto: what fits and is fastest."
    )
    intermediates: Literal["auto", "hold", "spill", "replay"] = Field(
        "auto",
        description="What becomes of the insides of a block while its linears are solved; "
        "auto: what fits and is fastest.",
    )
    statistics: Literal["auto", "device", "ram", "disk"] = Field(
        "auto", description="Where partial sums of statistics wait for each other; auto: what fits and is fastest."
    )

    keep_inputs: Annotated[int, Field(ge=1)] | Literal["auto", "never"] = Field(
        "auto",
        description="After how many blocks the next one's inputs are kept on disk, for a run that is interrupted.",
    )
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="Log metrics of every block to tensorboard, trackio or wandb, where installed."
    )
    dashboard: bool = Field(False, description="Serve Ray's dashboard on this machine's loopback interface.")

    @field_validator("address")
    @classmethod
    def _here(cls, value: str | None) -> str | None:
        return None if value == "local" else value

    @field_validator("vram", "ram", "disk", mode="before")
    @classmethod
    def _with_a_unit(cls, value: Any) -> Any:
        said = isinstance(value, str) and re.fullmatch(SIZE_WITH_UNIT, value)
        if value is None or said or (isinstance(value, int) and value >= 1 << 20):
            return value
        raise ValueError("expected a size with its unit, as 16GiB")

    @field_validator("log_to", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
            return value
        return tuple(dict.fromkeys(name.strip() for each in given for name in each.split(",")))

    @field_validator("dashboard")
    @classmethod
    def _of_our_own(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("address") is not None:
            raise ValueError("expected no --address beside it: that cluster's head has a dashboard of its own")
        return value

    @field_validator("workers")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected at least 1, or 'auto'")
        return value


class RunOptions(TypedDict, total=False):
    """The keys of :class:`Recipe` and :class:`Resources` as keyword arguments."""

    method: str
    sparsity: float | None
    pattern: str
    allocation: str
    allocation_options: dict[str, Value]
    options: dict[str, Value]
    methods: dict[str, str]
    calibration: str | None
    collected: str | None
    field: str
    samples: int
    seqlen: int | None
    route: Literal["router", "all"]
    expert_tokens: float
    expert_fallback: Literal["pool", "magnitude", "dense"]
    seed: int
    bos: Literal["auto", "always", "never"]
    fit: Literal["auto", "lockstep", "dense-block"]
    correction: float | None
    reconstruct: int
    reconstruct_rate: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    partition_samples: int
    partition_rows: int | None
    trust_remote_code: bool
    workers: int | Literal["auto"]
    address: str | None
    vram: int | str | None
    ram: int | str | None
    disk: int | str | None
    scratch: str | None
    activations: Literal["auto", "device", "ram", "disk"]
    intermediates: Literal["auto", "hold", "spill", "replay"]
    statistics: Literal["auto", "device", "ram", "disk"]
    keep_inputs: int | Literal["auto", "never"]
    log_to: str | tuple[str, ...]
    dashboard: bool


def read_options(recipe_file: str | Path | None, given: RunOptions) -> tuple[Recipe, Resources]:
    """Merge a YAML recipe with the options ``given``, which win.

    Raises:
        InputError: for an unreadable file, an unknown key, or a value of the wrong kind.
    """
    merged: dict[str, Any] = {}
    if recipe_file is not None:
        merged.update(_read_yaml(Path(recipe_file)))
    merged.update(given)
    known = [*Recipe.model_fields, *Resources.model_fields]
    for key in merged:
        if key not in known:
            raise OptionError(f"option {key!r} is unknown{nearest(key, known)}; known are {', '.join(known)}")
    try:
        return (
            Recipe(**{key: value for key, value in merged.items() if key in Recipe.model_fields}),
            Resources(**{key: value for key, value in merged.items() if key in Resources.model_fields}),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        raise OptionError(f"option {name}: {reason}, found {problem['input']!r}") from error


def merged_options(before: Mapping[str, Any], given: RunOptions) -> RunOptions:
    """Return the options of a run that is gone on with: ``given`` ones win over those of ``before``.

    Of the method's and the allocator's own options the given ones are replaced; another method or allocator begins with
    its defaults, and another pattern or file of an allocation with its own sparsity.
    """
    merged = {**before, **given}
    if given.get("method", before["method"]) == before["method"]:
        merged["options"] = {**before["options"], **given.get("options", {})}
    else:
        merged["options"] = given.get("options", {})
    if given.get("allocation", before["allocation"]) == before["allocation"]:
        merged["allocation_options"] = {**before["allocation_options"], **given.get("allocation_options", {})}
    else:
        merged["allocation_options"] = given.get("allocation_options", {})
    by_file = "allocation" in given and user_path(given["allocation"]).is_file()
    if ("pattern" in given or by_file) and "sparsity" not in given:
        merged["sparsity"] = None
    return cast(RunOptions, merged)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"--recipe {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise OptionError(f"--recipe {path}: expected a mapping of option names to values")
    return {key.replace("-", "_"): value for key, value in content.items()}


def checked_options(flag: str, owner: str, kind_of_options: type[Any], options: dict[str, Value]) -> Any:
    """Return the options of a method or allocator, given those that were set by ``flag``.

    Raises:
        InputError: for an unknown option, or a value of the wrong kind or range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind_of_options)}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            known = f"known are {', '.join(fields)}" if fields else "it has none"
            raise OptionError(f"{flag} {key}: {owner} has no such option{nearest(key, list(fields))}; {known}")
        kind: Any = type(fields[key].default)
        if kind is str:
            checked[key] = str(value)
            continue
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise OptionError(f"{flag} {key}={value}: expected a number like {fields[key].default}") from error
        if (kind is int and float(value) != number) or isinstance(value, bool) or not math.isfinite(number):
            raise OptionError(f"{flag} {key}={value}: expected a number like {fields[key].default}")
        checked[key] = number
    return kind_of_options(**checked)
