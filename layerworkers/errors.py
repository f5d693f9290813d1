"""How a command ends early: one hierarchy, in which each class is a kind of failure with a code of its own.

A message names what, what was found, and what to do about it; ``cause`` and ``remedy`` are those of the whole kind.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import ClassVar


class BillhookError(Exception):
    """Why a command ended early."""

    code: ClassVar[str]
    """Stays the same from version to version, for programs; docs/errors.md lists all of them."""
    exit_code: ClassVar[int]
    cause: ClassVar[str]
    remedy: ClassVar[str]


class InputError(BillhookError, ValueError):
    """The request or the input is wrong; nothing was changed (exit code 2)."""

    code = "bad-input"
    exit_code = 2
    cause = "the request or the input is wrong in a way that has no code of its own"
    remedy = "do what the message says"


class OptionError(InputError):
    """An option, alone or with others."""

    code = "bad-option"
    cause = "an option, a key of a recipe or an argument is unknown, out of range, or contradicts another"
    remedy = "correct it; the message names it, what was found, and what is expected or nearest"


class CheckpointError(InputError):
    """The files of a model."""

    code = "bad-checkpoint"
    cause = "a model's folder is missing, incomplete, damaged, or its files contradict each other"
    remedy = "download or copy the model again; the message names the file or tensor"


class UnsupportedModelError(InputError):
    """A model that is whole, but none that can be pruned here."""

    code = "unsupported-model"
    cause = "it is no causal language model, its weights are quantised or in another format, or transformers lacks it"
    remedy = "convert it as the message says, or choose another model; docs/families.md lists what is tried"


class TextError(InputError):
    """Calibration or evaluation text, or the tokenizer."""

    code = "bad-text"
    cause = "a text is missing, cannot be read or is too short, or the tokenizer does not fit the model"
    remedy = "give another text, or ask for fewer or shorter samples; for a tokenizer, add its files"


class OutputError(InputError):
    """Where the output should go."""

    code = "bad-output"
    cause = "the output cannot be written there, holds somebody else's files, or lies inside the source"
    remedy = "choose another folder with -o"


class OutputBusyError(InputError):
    """Another command has the output."""

    code = "output-busy"
    cause = "another billhook is writing to this output"
    remedy = "wait for it ('billhook status' shows it), or choose another folder"


class OtherPlanError(InputError):
    """The output holds a run that this request does not go on with."""

    code = "other-plan"
    cause = "the output holds a run with other options, another source, or other versions of the libraries"
    remedy = "give the options that it was begun with, or --resume, --from-block or --force as the message says"


class NoRunError(InputError):
    """There is no run, or none that is finished."""

    code = "no-run"
    cause = "the folder holds no run of billhook, or one that is not as far as the command needs"
    remedy = "give the folder that was -o; finish an unfinished run with 'billhook prune --resume'"


class DamagedRunError(InputError):
    """Journal or manifest of a run."""

    code = "damaged-run"
    cause = "the journal or the manifest of an output was changed or damaged by something else than a crash"
    remedy = "restore billhook/ in the output from a copy, or remove the output and begin again"


class BudgetError(InputError):
    """A budget that no way of working keeps to."""

    code = "does-not-fit"
    cause = "no way of working keeps to --ram, --vram or --disk"
    remedy = "raise the budget to the smallest that works, which the message names, or lower --samples or --seqlen"


class ClusterError(InputError):
    """A Ray cluster that cannot be joined."""

    code = "no-cluster"
    cause = "the Ray cluster of --address does not answer, refuses the token, or runs other versions"
    remedy = "see docs/cluster.md; leave --address out to use this machine"


class UnlikeNodesError(InputError):
    """Nodes that would not compute the same bytes."""

    code = "unlike-nodes"
    cause = "a node has other libraries, another kind of processor, or another source checkpoint than the driver"
    remedy = "use nodes of one kind, with the same libraries and the same model at the same path"


class RunError(BillhookError, RuntimeError):
    """The run failed and can be resumed (exit code 1)."""

    code = "run-failed"
    exit_code = 1
    cause = "the run failed in a way that has no code of its own"
    remedy = "do what the message says; the same command goes on from the last finished block"


class BlockLostError(RunError):
    """The block in progress is lost, for a reason that may pass: it is worth another try with new workers."""

    code = "block-lost"
    cause = "a worker or node died, fell silent or failed, as often as a block is tried"
    remedy = "see the end of the worker's log in the message; the same command goes on from that block"


class DiskFullError(RunError):
    """No room on a disk."""

    code = "disk-full"
    cause = "the disk of the output or of the scratch files is full, or a quota is used up"
    remedy = "make room, then give the same command again"


class DiskError(RunError):
    """A disk or file system that fails."""

    code = "disk-failed"
    cause = "reading, writing or syncing a file failed"
    remedy = "mend the disk or the mount, then give the same command again"


class NotFiniteError(RunError):
    """Numbers that overflowed."""

    code = "not-finite"
    cause = "activations, statistics or scores overflowed"
    remedy = "try --dtype float32 in another folder; look whether the dense model itself gives finite logits"


class IllConditionedError(RunError):
    """A Gram matrix that cannot be factorised."""

    code = "ill-conditioned"
    cause = "a Gram matrix is not positive definite, however much it is damped"
    remedy = "use more calibration samples, or raise damping or ridge with --set"


class OutputGoneError(RunError):
    """The output was taken away."""

    code = "output-gone"
    cause = "the output, or a file in it, was removed or replaced while a command wrote there"
    remedy = "begin again in a new folder"


class NoWorkersError(RunError):
    """Workers that cannot be started."""

    code = "no-workers"
    cause = "Ray did not start, has no room for a worker, or workers of an earlier command still live"
    remedy = "look at the machine's load and the cluster's nodes, then give the same command again"


class Interrupted(BillhookError):  # noqa: N818 - not an error: the user or the system asked for it
    """The run was asked to end and can be resumed (exit code 130)."""

    code = "interrupted"
    exit_code = 130
    cause = "a signal asked the command to end"
    remedy = "the same command goes on from the last finished block"


def kinds_of_error(base: type[BillhookError] = BillhookError) -> Iterator[type[BillhookError]]:
    """Yield every class that has a code, in the order of their definition, subclasses after their base."""
    for kind in base.__subclasses__():
        if "code" in vars(kind):
            yield kind
        yield from kinds_of_error(kind)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``" (did you mean X?)"`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
