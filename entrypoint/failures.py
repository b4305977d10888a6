"""From whatever was raised to one sentence on stderr and an exit code; a traceback only with --debug."""

import contextlib
import os
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from entrypoint.events import emit, tell
from runtime.errors import DeviceError, FourstepError, OutOfMemoryError, OutputError, first_sentence
from runtime.memory.exhausted import is_out_of_memory

INTERRUPTED = 130
INTERNAL = 1
DEVICE_SIGNS = ("cuda error", "cuda driver", "cublas", "cudnn", "nccl", "nvrtc")


class RunFailedError(Exception):
    """A run that failed, for the reason in `__cause__`, and that can go on from its run file.

    `step` of `steps` denoise steps are in it; `latents`: whether they are worth a decode by themselves.
    """

    def __init__(self, run_file: Path, step: int, steps: int, latents: bool) -> None:
        super().__init__(f"the run after step {step} of {steps} is kept in {run_file}")
        self.run_file = run_file
        self.step = step
        self.steps = steps
        self.latents = latents


@dataclass(frozen=True)
class Failure:
    """What is told of an exception."""

    code: int
    kind: str
    message: str


def report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Tell the user what `error` means; returns the exit code."""
    kept = error if isinstance(error, RunFailedError) else None
    cause = error.__cause__ if kept is not None and error.__cause__ is not None else error
    failure = understand(cause)
    if debug and failure.code != INTERRUPTED:
        traceback.print_exception(cause)
    if failure.code == INTERRUPTED:
        tell(failure.message)
    else:
        tell(failure.message, "error", "red")
    fields = {}
    if kept is not None:
        fields["run_file"] = str(kept.run_file.absolute())
        if kept.latents:
            fields["latents"] = fields["run_file"]
        tell(_how_to_go_on(kept))
    if as_json:
        emit("error", code=failure.code, kind=failure.kind, message=failure.message, **fields)
    return failure.code


def leave_at_once(code: int) -> None:
    """End a process that has used the GPU without its teardown.

    That waits for every kernel in the queue, and takes the interpreter and CUDA apart piece by piece; what a
    run has made has its name by then.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a reader that has left
                stream.flush()
        os._exit(code)


def understand(error: BaseException) -> Failure:
    """What an exception means to the user."""
    if isinstance(error, FourstepError):
        return Failure(error.exit_code, type(error).__name__, str(error))
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Failure(INTERRUPTED, "Interrupted", "interrupted; nothing half-written is left.")
    if isinstance(error, click.ClickException):
        return Failure(error.exit_code, "UsageError", _usage_sentence(error))
    if is_out_of_memory(error):
        return Failure(OutOfMemoryError.exit_code, "OutOfMemoryError", _memory_sentence(error))
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in DEVICE_SIGNS):
        return Failure(
            DeviceError.exit_code,
            "DeviceError",
            f"The GPU or its driver failed ({first_sentence(error)}); see whether nvidia-smi works and run "
            "it again, or run it with --device cpu.",
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return Failure(
            OutputError.exit_code,
            "OutputError",
            f"{where}{error.strerror}; check that the path is right and that there is space and permission.",
        )
    return Failure(
        INTERNAL,
        "InternalError",
        f"internal error, {type(error).__name__}: {first_sentence(error)}; this is a bug: run it again with "
        "--debug and report what it prints.",
    )


def _usage_sentence(error: click.ClickException) -> str:
    message = error.format_message().strip()
    message += "" if message.endswith((".", "?", "!", ")")) else "."
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return message
    name = error.param.name if isinstance(error, click.BadParameter) and error.param else None
    if name and error.ctx.get_parameter_source(name) == ParameterSource.ENVIRONMENT:
        message += f" It is set by {error.ctx.auto_envvar_prefix}_{name.upper()}."
    return f"{message} Try '{error.ctx.command_path} --help'."


def _memory_sentence(error: BaseException) -> str:
    where = "The GPU" if "cuda" in str(error).lower() else "The machine"
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    detail = f" (it was asked for {asked[1]} more)" if asked else ""
    return (
        f"{where} ran out of memory{detail}; ask for a smaller --height and "
        "--width or fewer --frames, close what else uses its memory, or choose a smaller card's --profile."
    )


def _how_to_go_on(kept: RunFailedError) -> str:
    command = f"t2v resume {shlex.quote(str(kept.run_file))}"
    if kept.step == kept.steps:
        return f"the latents are kept; to make the video from them: {command}"
    done = f" after step {kept.step} of {kept.steps}" if kept.step else ""
    return f"the run is kept{done}; to go on with it: {command}"
