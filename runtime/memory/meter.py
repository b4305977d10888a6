"""What a run really took of the host's memory."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def host_peak() -> int:
    """The most memory that this process has had resident so far, bytes.

    VmHWM where there is /proc; else ru_maxrss, which a process inherits from the one that started it.
    """
    peak, resident = _status("VmHWM"), _status("VmRSS")
    if peak is not None and resident is not None:
        return max(peak, resident)  # the kernel brings the peak up to date with a little delay
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field_name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file or field."""
    if not STATUS.exists():
        return None
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field_name:
            return int(value.split()[0]) * 1024
    return None
