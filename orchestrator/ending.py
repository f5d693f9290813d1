"""How a command ends: an exit code, and a line on standard error, or JSON, that says why."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from billhook.layerworkers.errors import BillhookError, DiskError, DiskFullError, Interrupted

BUG_CODE = 70
"""Exit code for what nobody thought of; EX_SOFTWARE of sysexits.h."""

Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, too.")]


def ending_with_code(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the failures of a command into a line on standard error and an exit code; give it the option ``--debug``.

    With ``--json``, standard output gets the failure as one line of JSON.
    """

    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            failure = _failure(error, debug)
            if debug:
                traceback.print_exc()
            if kwargs.get("json_output"):
                print(json.dumps({"error": failure}))
            print(f"billhook: {failure['message']}", file=sys.stderr)
            raise typer.Exit(failure["exit_code"]) from error

    functools.update_wrapper(run, command)
    of_command = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [*of_command.parameters.values(), option]
    run.__signature__ = of_command.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _failure(error: BaseException, debug: bool) -> dict[str, Any]:
    """Return code, message, cause, remedy and exit code of a failure."""
    if isinstance(error, Interrupted):
        why = f" ({error.__cause__})" if error.__cause__ is not None else ""
        return _told(Interrupted, f"interrupted{why}; the same command goes on from the last finished block")
    if isinstance(error, KeyboardInterrupt):
        return _told(Interrupted, "interrupted")
    if isinstance(error, BillhookError):
        return _told(type(error), str(error))
    if isinstance(error, OSError) and error.strerror:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
        return _told(kind, f"{error.filename or ''}: {error.strerror}".removeprefix(": "))
    where = "its traceback is above" if debug else _log(error)
    text = " ".join(str(error).split())
    return {
        "code": "bug",
        "message": f"this is a bug in billhook or in a library: {type(error).__name__}: {text}; {where}",
        "cause": "something happened that nobody thought of",
        "remedy": "report it, with the command and the traceback",
        "exit_code": BUG_CODE,
    }


def _told(kind: type[BillhookError], message: str) -> dict[str, Any]:
    return {
        "code": kind.code,
        "message": message,
        "cause": kind.cause,
        "remedy": kind.remedy,
        "exit_code": kind.exit_code,
    }


def _log(error: BaseException) -> str:
    """Write the traceback to a file of its own; return where it is, or how else to see it."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="billhook-", suffix=".log")
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{' '.join(sys.argv)}\nPython {platform.python_version()} on {platform.platform()}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError:
        return "run it again with --debug for the traceback"
    return f"the traceback is in {path}"
