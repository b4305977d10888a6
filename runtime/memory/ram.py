"""How much host memory this process may still take: what the kernel has, what each cgroup above it allows.

A container's limit is not in /proc/meminfo: whoever sizes buffers by that is killed without a word. The limit
lies in the files of the memory cgroup, v1 or v2, at every level from the process's own up to the root of the
mount; a pod's level may be tighter than its container's. What may be taken below a limit is

    limit - (usage - inactive_file)

because the page cache of files that were read once counts as usage and is dropped before anything is killed.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_UNLIMITED = 1 << 60  # v1 says "no limit" as the largest multiple of a page, v2 as "max"


@dataclass(frozen=True)
class Ram:
    """Host memory, bytes.

    total: the machine's, or the tightest limit if that is less. available: what can still be taken without
    swapping or being killed; what this process holds already is not in it, so a process that has grown asks
    for less: its ceiling is `available` plus what it has resident. source: who sets `available`: "host",
    "cgroup v1 /path", "cgroup v2 /path" or "WSL2".
    """

    total: int
    available: int
    source: str


@dataclass(frozen=True)
class Level:
    """One level of a cgroup hierarchy: where its files lie, its version, and its path as messages name it."""

    directory: Path
    version: int
    path: str

    def number(self, name: str) -> int | None:
        """A file that holds one number; None where it is absent, unreadable, no number, or no limit."""
        text = _text(self.directory / name).strip()
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None

    def field(self, file: str, *names: str) -> int:
        """The first of these fields of a file of `name number` lines; 0 where there is none of them."""
        fields = dict(line.split(" ", 1) for line in _text(self.directory / file).splitlines() if " " in line)
        found = [fields[name].strip() for name in names if name in fields]
        return int(found[0]) if found and found[0].isdigit() else 0


def host_ram(proc: Path = PROC) -> Ram:
    """What the host and the cgroups of this process leave it; what cannot be read sets no limit."""
    total, available = _host(proc)
    source = "WSL2" if is_wsl(proc) else "host"
    for level in levels("memory", proc):
        limit, left = _allowance(level)
        if limit is None or left is None:
            continue
        total = min(total, limit)
        if left < available:
            available, source = left, f"cgroup v{level.version} {level.path}"
    return Ram(total, available, source)


def cpu_cores(proc: Path = PROC) -> int:
    """Processors that this process may keep busy: its affinity, and the quota of its cgroups (at least 1)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    for level in levels("cpu", proc):
        if level.version == 2:
            quota, _, period = _text(level.directory / "cpu.max").strip().partition(" ")
        else:
            quota, period = (
                _text(level.directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            )
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def is_wsl(proc: Path = PROC) -> bool:
    """Whether the kernel is that of the Windows Subsystem for Linux, in a container too."""
    return bool(re.search(r"microsoft|wsl", _text(proc / "sys/kernel/osrelease"), re.IGNORECASE))


def levels(controller: str, proc: Path = PROC) -> Iterator[Level]:
    """The cgroups that bind this process, its own first, then those around it up to the root of the mount.

    Both hierarchies of a hybrid system are walked; a level without the controller has none of its files.
    """
    paths = _own_paths(controller, proc)
    for version, root, mountpoint in _mounts(controller, proc):
        if version not in paths:
            continue
        inside = _below(paths[version], root)
        while True:
            shown = f"{root.rstrip('/')}/{inside}".rstrip("/") or "/"
            yield Level(mountpoint / inside, version, shown)
            if not inside:
                break
            inside = inside.rpartition("/")[0]


# ---------------------------------------------------------------------------------------------------- reading


def _host(proc: Path) -> tuple[int, int]:
    """MemTotal and MemAvailable; where there is no /proc, physical memory for both."""
    fields = {}
    for line in _text(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split() and value.split()[0].isdigit():
            fields[name] = int(value.split()[0]) * 1024
    if "MemTotal" not in fields:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return physical, physical
    # Kernels before 3.14 do not say MemAvailable: free pages, and the cache that is dropped first.
    fallback = fields.get("MemFree", 0) + fields.get("Inactive(file)", 0)
    return fields["MemTotal"], fields.get("MemAvailable", fallback)


def _allowance(level: Level) -> tuple[int | None, int | None]:
    """The limit of a level, and what it leaves; None where it sets none."""
    if level.version == 2:
        # Above memory.high nothing is killed, but every allocation waits for reclaim: a limit all the same.
        limits = [level.number(name) for name in ("memory.max", "memory.high")]
        limit = min((one for one in limits if one is not None), default=None)
        usage, cache = level.number("memory.current"), level.field("memory.stat", "inactive_file")
    else:
        limit, usage = level.number("memory.limit_in_bytes"), level.number("memory.usage_in_bytes")
        # The plain field is this level's own; the total is that of all below it, as the usage is.
        cache = level.field("memory.stat", "total_inactive_file", "inactive_file")
    if limit is None or usage is None:
        return limit, limit
    return limit, max(0, limit - max(0, usage - cache))


def _own_paths(controller: str, proc: Path) -> dict[int, str]:
    """Version -> the path of this process's cgroup, from /proc/self/cgroup (`id:controllers:path`)."""
    paths = {}
    for line in _text(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    return paths


def _mounts(controller: str, proc: Path) -> Iterator[tuple[int, str, Path]]:
    """(version, root, mount point) of the cgroup file systems that may hold this controller's files.

    /proc/self/mountinfo: id parent major:minor ROOT POINT options [optional ...] - TYPE source OPTIONS.
    """
    for line in _text(proc / "self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        before, after = head.split(), tail.split()
        if len(before) < 5 or len(after) < 3:
            continue
        root, point = _unescaped(before[3]), Path(_unescaped(before[4]))
        if after[0] == "cgroup2":
            yield 2, root, point
        elif after[0] == "cgroup" and controller in after[2].split(","):
            yield 1, root, point


def _below(path: str, root: str) -> str:
    """`path` as seen from the mount whose root it is, without a leading slash; "" for the mount itself.

    In a container that shares the host's cgroup names, the path is the host's and so is the mount's root; in
    one with names of its own both are "/". A path outside of the mount ("/..", after a move) means the mount.
    """
    if path == root or ".." in path.split("/"):
        return ""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :].strip("/") if path.startswith(prefix) else ""


def _unescaped(field: str) -> str:
    """A field of mountinfo, where spaces are written as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _text(path: Path) -> str:
    """The text of a small file of the kernel's; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
