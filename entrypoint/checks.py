"""The checks of `t2v doctor` that need no GPU: programs, memory, disks, directories and weights.

No torch here; it comes with the headers of weights that are there.
"""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from entrypoint.cache import choose_cache
from entrypoint.findings import Finding, Scene, exists_or_parent, fail, ok, split_advice, warn, writable
from entrypoint.output import default_directory
from entrypoint.table import count, size
from runtime.device import torch_cuda
from runtime.errors import DeviceError, OutputError, WeightsError
from runtime.memory.ram import is_wsl

PYTHON = (3, 11)
TORCH = ((2, 6), (2, 13))
"""The oldest and the newest torch that the engine runs on; those of pyproject.toml."""
TORCH_HEAVY_DECODE = (2, 9)
"""Its conv3d takes twice the memory (pytorch issues 166643, 166790)."""

RING = 400 << 20
"""Bytes of the pinned staging ring at its default size."""
COMFORTABLE_RAM = 6 << 30
"""Bytes with which the leanest plan of the 14B model runs: 3 GB, the system, and some room."""
SLOW_DISK = 0.5e9
"""Bytes/s: below it, 14 GB of weights that do not fit in RAM take longer to read than a step to compute."""
LEAST_SHARED_MEMORY = 64 << 20
LITTLE_SPACE = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
SYNTHETIC = "synthetic.json"


def check_python(scene: Scene) -> Iterator[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        yield fail("python", found, f"Install Python {wanted} or newer, or use the image.", DeviceError)
    else:
        yield ok("python", found)


def check_torch(scene: Scene) -> Iterator[Finding]:
    """The installed torch: its version, and whether it has CUDA where there is a GPU."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        fix = "Install the pinned versions: make setup, or pip install . with a torch for your CUDA."
        yield fail("torch", "not installed", fix, DeviceError)
        return
    cuda = torch_cuda()
    found = f"{installed}, built {'without CUDA' if cuda is None else f'for CUDA {cuda[0]}.{cuda[1]}'}"
    number = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    oldest, newest = TORCH
    if cuda is None and scene.stock.gpus:
        fix = "Install the CUDA build of torch (pip's default on Linux), or use the image."
        yield fail("torch", f"{found}, and there is a GPU", fix, DeviceError)
    elif not oldest <= number <= newest:
        span = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        yield warn("torch", found, f"Install a torch from {span}: others were not tried.")
    elif number == TORCH_HEAVY_DECODE and cuda is not None:
        yield warn("torch", f"{found}: its conv3d doubles the decode's memory", "Install torch 2.8 or 2.10.")
    else:
        yield ok("torch", found)


def check_compiler(scene: Scene) -> Iterator[Finding]:
    """Triton builds a small C program for each kernel, so it needs a C compiler."""
    if find_spec("triton") is None:
        yield ok("triton", "not installed: plain torch kernels")
        return
    named = os.environ.get("CC")
    compiler = next(filter(None, map(shutil.which, filter(None, (named, "cc", "gcc", "clang")))), None)
    found = f"{_version('triton')}, C compiler {compiler or 'not found'}"
    if compiler is not None:
        yield ok("triton", found)
    elif not scene.stock.gpus:
        yield ok("triton", f"{found}, none needed without a GPU")
    else:
        yield warn("triton", found, "Install one (apt-get install gcc), or set CC: kernels cannot be built.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"


def check_place(scene: Scene) -> Iterator[Finding]:
    """Where the program runs: a container, WSL2, and how many processors."""
    parts = [name for name in (container(), "WSL2" if scene.machine.wsl else None) if name]
    where = " in ".join(parts) if parts else "no container"
    yield ok("system", f"{where}, {count(scene.machine.cpu_cores, 'processor')}")


def container(root: Path = Path("/")) -> str | None:
    """Which container engine runs this, as far as it shows; None for none."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run" / ".containerenv").exists():
        return "Podman"
    try:
        groups = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"kubepods|docker|libpod|containerd|lxc", groups)
    names = {"kubepods": "Kubernetes", "docker": "Docker", "libpod": "Podman"}
    return names.get(found[0], found[0]) if found else None


def check_memory(scene: Scene) -> Iterator[Finding]:
    """Host memory that this process may take, and who limits it."""
    machine = scene.machine
    by = "" if machine.ram_source == "host" else f", limited by {machine.ram_source}"
    found = f"{size(machine.ram_available)} available of {size(machine.ram_total)}{by}"
    if machine.ram_available >= COMFORTABLE_RAM:
        yield ok("memory", found)
        return
    need = size(COMFORTABLE_RAM)
    if machine.ram_source.startswith("cgroup"):
        where = "docker run --memory, mem_limit in compose, MemoryMax of a unit"
        fix = f"Raise the limit to {need} or more: {where}."
    elif machine.wsl:
        fix = (
            "Write memory=24GB (less than Windows has) under [wsl2] in %UserProfile%\\.wslconfig and run "
            "wsl --shutdown."
        )
    else:
        fix = f"Close other programs until {need} are available; the 14B model is refused with much less."
    yield warn("memory", found, fix)


def check_pinning(scene: Scene) -> Iterator[Finding]:
    """Memory that the GPU can copy from directly."""
    machine = scene.machine
    if scene.gpu is None:
        return
    if machine.pinnable is None:
        why = machine.pin_error or "not tried"
        yield warn("pinned memory", why, "See the rows of driver and GPU: CUDA must start.")
    elif machine.pinnable >= RING or machine.pin_error is None:
        yield ok("pinned memory", f"{size(machine.pinnable)} could be pinned")
    else:
        found = f"only {size(machine.pinnable)}: {machine.pin_error}"
        fix = (
            "Nothing to set under WSL2: the staging ring gets smaller, and without any copies are slower."
            if machine.wsl
            else "Close what else pins memory, or raise the container's memory limit; copies are slower so."
        )
        yield warn("pinned memory", found, fix)


def check_shared_memory(scene: Scene) -> Iterator[Finding]:
    """/dev/shm."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        yield ok("shared memory", f"no {SHARED_MEMORY}; nothing here needs it")
        return
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{SHARED_MEMORY} holds {size(total)}, {size(free)} free"
    if total < LEAST_SHARED_MEMORY:
        yield warn("shared memory", found, "Start the container with --shm-size 256m (shm_size in compose).")
    else:
        yield ok("shared memory", found)


def check_disk(scene: Scene) -> Iterator[Finding]:
    """How fast the weights are read."""
    speed, how = scene.machine.disk, scene.machine.disk_source
    if speed is None:
        yield ok("disk", how)
    elif speed >= SLOW_DISK:
        yield ok("disk", f"weights are read at {speed / 1e9:.2f} GB/s: {how}")
    else:
        found = f"weights are read at {speed / 1e9:.2f} GB/s: {how}"
        fix = "Move them to an NVMe disk, or have RAM for them: otherwise steps wait for the disk."
        yield warn("disk", found, fix)


def check_directories(scene: Scene) -> Iterator[Finding]:
    """The directories of outputs and of the cache: writable, and with space."""
    asked = os.environ.get("T2V_OUTPUT", "")
    outputs = default_directory()
    if asked:
        outputs = Path(asked).parent if asked.endswith(".mp4") else Path(asked)
    yield _directory("outputs", outputs, "videos go there", OutputError)
    cache = choose_cache(os.environ.get("T2V_CACHE") or None)
    if cache is not None:
        yield _directory("cache", cache, "compiled kernels and text states are kept there", None)


def _directory(name: str, path: Path, purpose: str, error: type[OutputError] | None) -> Finding:
    there = exists_or_parent(path)
    free = shutil.disk_usage(there).free
    found = f"{path.absolute()}, {size(free)} free"
    if not writable(path):
        user = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        what = f"{path.absolute()} cannot be written by {user}, and {purpose}"
        fix = f"Make {there} writable for that user, or name another directory (--output, --cache)."
        if error is None:
            return warn(name, what, fix)
        return fail(name, what, fix, error)
    if free < LITTLE_SPACE:
        return warn(name, found, "Make room: a full disk ends a run at its last step.")
    return ok(name, found)


# ---------------------------------------------------------------------------------------------------- weights


def check_weights(scene: Scene) -> Iterator[Finding]:
    """The model that was asked for, or every model that lies in the weights directory."""
    from runtime.profiles import list_manifests, load_manifest
    from runtime.weights import shelf

    directory = scene.weights
    if scene.model is not None:
        yield _asked_for(scene.model, scene)
        return
    if not directory.is_dir():
        found = f"there is no directory {directory.absolute()}"
        yield warn("weights", found, f"{_pull(None, directory).rstrip('.')}; --model demo needs none.")
        return
    manifests = [one for one in map(load_manifest, list_manifests()) if one.embedded is None]
    states = {one.model: one for one in shelf(manifests, directory)}
    there = [name for name, one in states.items() if one.state == "present"]
    partial = [name for name, one in states.items() if one.state == "partial"]
    if not there and not partial:
        room = size(shutil.disk_usage(directory).free)
        found = f"no model in {directory.absolute()}, {room} free"
        yield warn("weights", found, f"{_pull(None, directory).rstrip('.')}; --model demo needs none.")
    for name in there:
        yield _verified(name, directory)
    for name in partial:
        lacking = count(len(states[name].missing), "file")
        yield warn("weights", f"{name}: {lacking} not there yet", _pull(name, directory))


def _asked_for(model: str, scene: Scene) -> Finding:
    """One model, as a run would choose and find it: a variant of a family, or a directory of its own."""
    from runtime.device import choose_profile
    from runtime.profiles import DIRECTORY_MODEL, find_model, resolve_model

    profile, _ = choose_profile(scene.gpu)
    try:
        manifest, directory = find_model(model, profile, scene.weights)
    except WeightsError:
        manifest = resolve_model(model, profile)
        found = f"there is no directory {scene.weights.absolute()}"
        return fail("weights", found, _pull(manifest.name, scene.weights), WeightsError)
    if manifest.family != DIRECTORY_MODEL:
        return _verified(manifest.name, directory)
    from runtime.loading import open_files  # torch: headers are all that such a directory says of itself

    try:
        files = open_files(manifest, directory)
    except WeightsError as error:
        found, fix = split_advice(str(error))
        return fail("weights", found, fix or "Download the model again, or name its directory.", WeightsError)
    return ok(
        "weights", f"{directory}: {files.transformer.quantization}, {size(files.nbytes)}, headers are sound"
    )


def _verified(name: str, directory: Path) -> Finding:
    """A model's files against their sizes and headers."""
    from runtime.profiles import load_manifest
    from runtime.weights import shelf, verify
    from runtime.weights.plan import decimal

    manifest = load_manifest(name)
    if (directory / SYNTHETIC).is_file() and manifest.embedded is None:
        there = [one for one in shelf([manifest], directory) if one.state == "present"]
        if there:
            fix = "Good for measuring; for videos, download the model into another directory."
            return warn("weights", f"{name}: random numbers (t2v weights synth), no model", fix)
    checks = verify(manifest, directory)
    wrong = [one for one in checks if one.state != "ok"]
    if wrong or not checks:
        first = f", first {wrong[0].target} ({wrong[0].reason or wrong[0].state})" if wrong else ""
        found = f"{name}: {count(len(wrong), 'file')} missing or wrong{first}"
        if manifest.embedded is not None:
            return fail("weights", found, "Install the program again.", WeightsError)
        return fail("weights", found, _pull(name, directory), WeightsError)
    how = "ships with the program"
    if manifest.embedded is None:
        known = next(iter(shelf([manifest], directory))).verified
        how = "verified when it came" if known else "sizes and headers are sound, no digests known"
    total = decimal(sum(one.bytes or 0 for one in checks))
    return ok("weights", f"{name}: {count(len(checks), 'file')}, {total}, {how}")


def _pull(name: str | None, directory: Path) -> str:
    model = name or "wan2.1-t2v-14b-4step-fp8"
    return f"Download it with `t2v weights pull --model {model} --weights {shlex.quote(str(directory))}`."


def advice_for_no_driver() -> str:
    """What to do where a GPU is there and its driver is not."""
    if is_wsl():
        return "Install the NVIDIA driver in Windows, none in Linux, and run wsl --shutdown."
    if container() is not None:
        return "Start the container with --gpus all, and install the NVIDIA container toolkit on the host."
    return "Install the NVIDIA driver, 550 or newer, and reboot."
