"""From whatever was raised to one sentence on stderr and an exit code; a traceback only with --debug."""

import re
import shlex
import traceback
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from entrypoint.events import emit, tell
from runtime.errors import DeviceError, FourstepError, OutOfMemoryError, OutputError

INTERRUPTED = 130
INTERNAL = 1
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
DEVICE_SIGNS = ("cuda error", "cuda driver", "cublas", "cudnn", "nccl", "nvrtc")


class RunFailedError(Exception):
    """A run that failed, for the reason in `__cause__`, after its latents were worth keeping."""

    def __init__(self, latents: Path, step: int, steps: int) -> None:
        super().__init__(f"latents of step {step} of {steps} kept in {latents}")
        self.latents = latents
        self.step = step
        self.steps = steps


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
        fields["latents"] = str(kept.latents.absolute())
        tell(_about_latents(kept))
    if as_json:
        emit("error", code=failure.code, kind=failure.kind, message=failure.message, **fields)
    return failure.code


def understand(error: BaseException) -> Failure:
    """What an exception means to the user."""
    if isinstance(error, FourstepError):
        return Failure(error.exit_code, type(error).__name__, str(error))
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Failure(INTERRUPTED, "Interrupted", "interrupted; nothing half-written is left.")
    if isinstance(error, click.ClickException):
        return Failure(error.exit_code, "UsageError", _usage_sentence(error))
    if _is_out_of_memory(error):
        return Failure(OutOfMemoryError.exit_code, "OutOfMemoryError", _memory_sentence(error))
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in DEVICE_SIGNS):
        return Failure(
            DeviceError.exit_code,
            "DeviceError",
            f"The GPU or its driver failed ({_first_line(error)}); see whether nvidia-smi works and run it "
            "again, or run it with --device cpu.",
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
        f"internal error, {type(error).__name__}: {_first_line(error)}; this is a bug: run it again with "
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


def _is_out_of_memory(error: BaseException) -> bool:
    # By name and text: torch may not be imported, and its allocators raise plain RuntimeErrors too.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in OUT_OF_MEMORY_SIGNS)


def _memory_sentence(error: BaseException) -> str:
    where = "The GPU" if "cuda" in str(error).lower() else "The machine"
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    detail = f" (it was asked for {asked[1]} more)" if asked else ""
    return (
        f"{where} ran out of memory{detail}; ask for a smaller --height and "
        "--width or fewer --frames, close what else uses its memory, or choose a smaller card's --profile."
    )


def _about_latents(kept: RunFailedError) -> str:
    done = "" if kept.step == kept.steps else f", of step {kept.step} of {kept.steps},"
    command = f"t2v decode {shlex.quote(str(kept.latents))}"
    return f"the latents{done} are kept; to make the video from them: {command}"


def _first_line(error: BaseException) -> str:
    """The first sentence of torch's messages, which go on for a paragraph about its allocator."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else ""
