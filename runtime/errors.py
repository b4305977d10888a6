"""What can go wrong, as the user meets it: one sentence and one exit code for each kind.

Every error says what, the value, what was expected and what to do. They are raised where the fault is
found and caught once, at the edge (entrypoint); a bare traceback is a bug.
"""


class FourstepError(Exception):
    """Base of all errors that are meant for the user; `exit_code` is the process's exit status."""

    exit_code = 1


class RequestError(FourstepError):
    """A bad argument: size, frames, prompt, steps, an unknown name, a malformed profile (exit 2)."""

    exit_code = 2


class OutputError(FourstepError):
    """The output path cannot be used or the writing failed: exists, unwritable, disk full (exit 2)."""

    exit_code = 2


class WeightsError(FourstepError):
    """Weights missing, corrupt, truncated, of another family or of another format (exit 3)."""

    exit_code = 3


class PlanError(FourstepError):
    """The run does not fit the memory that there is (exit 4)."""

    exit_code = 4


class DeviceError(FourstepError):
    """No such device, or its driver does not answer (exit 5)."""

    exit_code = 5


class OutputCheckError(FourstepError):
    """Latents or frames are not finite, or flat: the video would be black or noise (exit 6)."""

    exit_code = 6


class OutOfMemoryError(FourstepError):
    """Out of memory in spite of the plan (exit 7)."""

    exit_code = 7


def first_sentence(error: object) -> str:
    """The first sentence of a message, for libraries that say more; the type's name if it is empty.

    Of torch's out of memory the second too, which says how much was asked for.
    """
    sentences = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")
    more = [one for one in sentences[1:2] if one.startswith("Tried to allocate")]
    return ". ".join([sentences[0], *more])


def first_line(error: object) -> str:
    """The first line of a message, to stand behind the type's name; "no message" if it is empty."""
    return (str(error).strip().splitlines() or ["no message"])[0]
