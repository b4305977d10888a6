"""What a machine has: made-up /proc trees and drivers of every kind, and the real kernel where it may be."""

import ctypes
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.device import Gpu
from runtime.memory import disk, machine, pinning
from runtime.memory.disk import filesystem, largest_files, probe_disk
from runtime.memory.machine import look
from runtime.memory.pinning import STEP, probe_pinning
from runtime.memory.ram import Ram, cpu_cores, host_ram, is_wsl, levels

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
CARD = Gpu(0, "NVIDIA GeForce RTX 4070", "GPU-1", 12 * GIB, 11 * GIB, (8, 9), "580.65")


# -------------------------------------------------------------------------------------- a /proc of one's own


class Kernel:
    """A /proc and cgroup file systems below a temporary directory."""

    def __init__(self, place: Path, total: int = 32 * GIB, available: int = 20 * GIB) -> None:
        self.place = place
        self.proc = place / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "sys" / "kernel").mkdir(parents=True)
        self.write("sys/kernel/osrelease", "6.8.0-60-generic\n")
        self.write(
            "meminfo", f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n"
        )
        self.lines: list[str] = ["22 1 0:20 / /proc rw - proc proc rw"]

    def write(self, name: str, text: str) -> None:
        (self.proc / name).write_text(text)

    def mount(self, version: int, root: str = "/", controllers: str = "memory", point: str = "") -> Path:
        """A cgroup mount, listed in mountinfo; returns its directory."""
        where = self.place / (point or f"cgroup{version}-{controllers.replace(',', '-')}")
        where.mkdir(parents=True, exist_ok=True)
        kind = "cgroup2 cgroup2 rw,nsdelegate" if version == 2 else f"cgroup cgroup rw,{controllers}"
        shown = str(where).replace(" ", "\\040")
        self.lines.append(f"{len(self.lines)} 1 0:30 {root} {shown} rw,nosuid shared:9 - {kind}")
        self.write("self/mountinfo", "\n".join(self.lines) + "\n")
        return where


def v2_level(
    directory: Path, limit: int | str, usage: int = 0, cache: int = 0, high: int | str = "max"
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.high").write_text(f"{high}\n")
    (directory / "memory.current").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 7\n")
    return directory


def v1_level(directory: Path, limit: int, usage: int = 0, cache: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {cache}\n")
    return directory


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_a_host_without_limits(kernel: Kernel) -> None:
    ram = host_ram(kernel.proc)
    assert (ram.total, ram.available, ram.source) == (32 * GIB, 20 * GIB, "host")


def test_v2_takes_the_tightest_level_and_gives_the_page_cache_back(kernel: Kernel) -> None:
    mount = kernel.mount(2)
    kernel.write("self/cgroup", "0::/pod/box\n")
    v2_level(mount / "pod" / "box", "max", 9 * GIB)
    assert host_ram(kernel.proc).source == "host"
    v2_level(mount / "pod" / "box", 12 * GIB, usage=11 * GIB, cache=7 * GIB)
    ram = host_ram(kernel.proc)
    assert (ram.total, ram.available, ram.source) == (12 * GIB, 8 * GIB, "cgroup v2 /pod/box")
    v2_level(mount / "pod", 10 * GIB, usage=6 * GIB, cache=1 * GIB)
    ram = host_ram(kernel.proc)
    assert (ram.total, ram.available, ram.source) == (10 * GIB, 5 * GIB, "cgroup v2 /pod")
    v2_level(mount / "pod" / "box", "max", usage=2 * GIB, high=3 * GIB)
    assert host_ram(kernel.proc).available == GIB


def test_more_than_the_limit_in_use_leaves_nothing(kernel: Kernel) -> None:
    v2_level(kernel.mount(2), 4 * GIB, usage=5 * GIB)
    kernel.write("self/cgroup", "0::/\n")
    assert host_ram(kernel.proc).available == 0


def test_a_container_with_names_of_its_own_sees_itself_as_the_root(kernel: Kernel) -> None:
    v2_level(kernel.mount(2, point="sys fs"), 6 * GIB, usage=2 * GIB, cache=GIB)  # mountinfo escapes spaces
    kernel.write("self/cgroup", "0::/\n")
    ram = host_ram(kernel.proc)
    assert (ram.available, ram.source) == (5 * GIB, "cgroup v2 /")


def test_v1_in_a_container_that_shares_the_names_of_the_host(kernel: Kernel) -> None:
    mount = kernel.mount(1, root="/docker/0abc")
    v1_level(mount, 8 * GIB, usage=3 * GIB, cache=2 * GIB)
    kernel.write("self/cgroup", "9:cpu,cpuacct:/docker/0abc\n4:memory:/docker/0abc\n0::/\n")
    ram = host_ram(kernel.proc)
    assert (ram.total, ram.available, ram.source) == (8 * GIB, 7 * GIB, "cgroup v1 /docker/0abc")


def test_v1_levels_and_its_word_for_no_limit(kernel: Kernel) -> None:
    mount = kernel.mount(1)
    v1_level(mount, 9223372036854771712, usage=15 * GIB)
    v1_level(mount / "user" / "job", 9223372036854771712, usage=GIB)
    v1_level(mount / "user", 16 * GIB, usage=GIB)
    kernel.write("self/cgroup", "4:memory:/user/job\n")
    ram = host_ram(kernel.proc)
    assert (ram.available, ram.source) == (15 * GIB, "cgroup v1 /user")


def test_a_hybrid_system_walks_both(kernel: Kernel) -> None:
    v1_level(kernel.mount(1), 9223372036854771712)
    unified = kernel.mount(2)
    unified.joinpath("slice").mkdir()  # without the memory controller there are no files of it
    kernel.write("self/cgroup", "4:memory:/\n0::/slice\n")
    assert host_ram(kernel.proc).source == "host"
    assert {level.version for level in levels("memory", kernel.proc)} == {1, 2}
    v2_level(unified / "slice", 3 * GIB)
    assert host_ram(kernel.proc).source == "cgroup v2 /slice"


def test_a_process_moved_out_of_its_namespace_counts_the_mount(kernel: Kernel) -> None:
    v2_level(kernel.mount(2), 5 * GIB, usage=GIB)
    kernel.write("self/cgroup", "0::/../other\n")
    assert host_ram(kernel.proc).available == 4 * GIB


@pytest.mark.parametrize("text", ["", "\n", "garbage", "-1", "max extra", "\x00\xff"])
def test_unreadable_limits_set_none(kernel: Kernel, text: str) -> None:
    level = v2_level(kernel.mount(2), 4 * GIB)
    kernel.write("self/cgroup", "0::/\n")
    level.joinpath("memory.max").write_text(text)
    assert host_ram(kernel.proc).source == "host"
    level.joinpath("memory.max").write_text(str(4 * GIB))
    level.joinpath("memory.current").unlink()
    level.joinpath("memory.stat").write_text(text)
    assert host_ram(kernel.proc).available == 4 * GIB


def test_broken_proc_files(kernel: Kernel) -> None:
    v2_level(kernel.mount(2), 4 * GIB)
    kernel.write("self/cgroup", "nonsense\n0:\n::::\n")
    kernel.write("self/mountinfo", "1 2 3\n - \n1 1 0:3 / /x rw - cgroup2\n")
    assert host_ram(kernel.proc).source == "host"
    kernel.write("meminfo", "MemTotal: 1024 kB\nMemFree: 100 kB\nInactive(file): 50 kB\nOdd\n")
    assert host_ram(kernel.proc).available == 150 << 10
    absent = host_ram(kernel.place / "nowhere")
    assert absent.total == absent.available > 0


def test_wsl(kernel: Kernel) -> None:
    assert not is_wsl(kernel.proc)
    kernel.write("sys/kernel/osrelease", "5.15.167.4-microsoft-standard-WSL2\n")
    assert is_wsl(kernel.proc)
    assert host_ram(kernel.proc).source == "WSL2"
    v2_level(kernel.mount(2), 4 * GIB)
    kernel.write("self/cgroup", "0::/\n")
    assert host_ram(kernel.proc).source == "cgroup v2 /"


def test_processors_of_a_quota(kernel: Kernel) -> None:
    real = len(os.sched_getaffinity(0))
    assert cpu_cores(kernel.proc) == real
    mount = kernel.mount(2)
    kernel.write("self/cgroup", "0::/\n5:cpu,cpuacct:/\n")
    mount.joinpath("cpu.max").write_text("max 100000\n")
    assert cpu_cores(kernel.proc) == real
    mount.joinpath("cpu.max").write_text("20000 100000\n")
    assert cpu_cores(kernel.proc) == 1
    mount.joinpath("cpu.max").write_text("9900000 100000\n")
    assert cpu_cores(kernel.proc) == real
    v1 = kernel.mount(1, controllers="cpu,cpuacct")
    v1.joinpath("cpu.cfs_period_us").write_text("100000\n")
    v1.joinpath("cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_cores(kernel.proc) == real
    v1.joinpath("cpu.cfs_quota_us").write_text("100000\n")
    assert cpu_cores(kernel.proc) == 1


# ------------------------------------------------------------------------------------------ the real kernel


@pytest.fixture
def real_cgroup() -> Iterator[tuple[Path, str]]:
    """A memory cgroup of our own below the root of the mount, and the name of its limit; or a skip."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    tops = [level for level in levels("memory") if (level.directory / "cgroup.procs").exists()]
    # Each hierarchy ends with its mount; a hybrid system has two, of which one has the controller.
    reason = "no cgroup file system is mounted here"
    for top in reversed(tops):
        group = top.directory / f"fourstep-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            reason = f"no cgroup can be made here ({error.strerror})"
            continue
        if (group / names[top.version]).exists():
            break
        group.rmdir()
        reason = "the memory controller is not enabled for new cgroups here"
    else:
        pytest.skip(reason)
    try:
        yield group, names[top.version]
    finally:
        for _ in range(50):  # the kernel forgets an ended process with a little delay
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.02)


def test_a_real_cgroup_limits_a_child(real_cgroup: tuple[Path, str]) -> None:
    group, limit = real_cgroup
    bound = 300 << 20
    (group / limit).write_text(str(bound))
    code = (
        "import os, sys, json; from pathlib import Path\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from runtime.memory.ram import host_ram\n"
        "before = host_ram()\n"
        "held = bytearray(os.urandom(1 << 20) * 100)\n"
        "after = host_ram()\n"
        "print(json.dumps([vars(before), vars(after)]))"
    )
    command = [sys.executable, "-c", code, str(group)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    print(f"limit {bound >> 20} MiB, available {before['available'] >> 20}, then {after['available'] >> 20}")
    assert before["total"] == after["total"] == bound // 4096 * 4096
    assert 150 << 20 < before["available"] < bound
    assert before["available"] - after["available"] == pytest.approx(100 << 20, rel=0.1)
    assert before["source"].startswith("cgroup v") and before["source"].endswith(group.name)


def test_here_is_a_machine() -> None:
    found = look(None, None)
    assert 0 < found.ram_available <= found.ram_total
    assert found.cpu_cores >= 1
    assert (found.vram_free, found.disk, found.pinnable) == (0, None, None)


# ---------------------------------------------------------------------------------------------------- pinning


class Driver:
    """A libcuda that pins at most `limit` bytes, and notes what it was asked for."""

    def __init__(self, limit: int, **faults: int) -> None:
        self.limit = limit
        self.faults = faults
        self.blocks: dict[int, int] = {}
        self.largest = 0
        self.retained = self.pushed = 0
        self.device: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu") and name in self.faults:
            return lambda *arguments: self.faults[name]
        raise AttributeError(name)

    def cuInit(self, flags: ctypes.c_uint) -> int:
        return self.faults.get("init", 0)

    def cuDeviceGet(self, handle: Any, device: ctypes.c_int) -> int:
        self.device = device.value
        return self.faults.get("device", 0)

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: ctypes.c_int) -> int:
        if code := self.faults.get("retain", 0):
            return code
        self.retained += 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.pushed += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.pushed -= 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, handle: ctypes.c_int) -> int:
        self.retained -= 1
        return 0

    def cuMemHostAlloc(self, pointer: Any, size: ctypes.c_size_t, flags: ctypes.c_uint) -> int:
        assert self.pushed == 1, "no context is current"
        if sum(self.blocks.values()) + size.value > self.limit:
            return 2
        address = 0x1000 * (len(self.blocks) + 1)
        self.blocks[address] = size.value
        self.largest = max(self.largest, sum(self.blocks.values()))
        pointer._obj.value = address
        return 0

    def cuMemFreeHost(self, pointer: ctypes.c_void_p) -> int:
        assert pointer.value is not None
        del self.blocks[pointer.value]
        return 0

    def cuGetErrorName(self, code: ctypes.c_int, text: Any) -> int:
        if code.value != 2:
            return 1
        text._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0

    def at_rest(self) -> bool:
        return not self.blocks and self.retained == 0 and self.pushed == 0


def test_pinning_stops_where_the_driver_refuses_and_gives_everything_back() -> None:
    driver = Driver(limit=5 * STEP + 1)
    found = probe_pinning(16 * STEP, device=1, driver=driver)
    assert found.bytes == 5 * STEP
    assert found.error == "the driver refused 64 MiB after 320 MiB (CUDA_ERROR_OUT_OF_MEMORY)"
    assert driver.at_rest() and driver.device == 1


@pytest.mark.parametrize("want", [0, 1, STEP, 3 * STEP + 12345])
def test_pinning_never_takes_more_than_was_asked(want: int) -> None:
    driver = Driver(limit=1 << 40)
    assert probe_pinning(want, driver=driver) == pinning.Pinnable(want)
    assert driver.largest == want and driver.at_rest()


def test_nothing_can_be_pinned() -> None:
    found = probe_pinning(STEP, driver=Driver(limit=0))
    assert found.bytes == 0 and found.error is not None


@pytest.mark.parametrize(("step", "name"), [("init", "cuInit"), ("retain", "cuDevicePrimaryCtxRetain")])
def test_a_driver_that_does_not_start(step: str, name: str) -> None:
    driver = Driver(limit=1 << 40, **{step: 999})
    assert probe_pinning(STEP, driver=driver) == pinning.Pinnable(None, f"{name} failed (error 999)")
    assert driver.at_rest()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    found = probe_pinning(STEP)
    assert found.bytes is None and "was not found" in str(found.error)
    assert probe_pinning(STEP, driver=object()).bytes is None


def test_a_full_machine_is_not_pinned_further(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def probe(want: int, device: int) -> pinning.Pinnable:
        asked.append((want, device))
        return pinning.Pinnable(want)

    monkeypatch.setattr(machine, "try_pinning", probe)
    monkeypatch.setattr(machine, "host_ram", lambda: Ram(8 * GIB, GIB, "host"))
    found = look(None, CARD, pin_want=512 << 20)
    assert asked == [(256 << 20, 0)]
    assert (found.pinnable, found.vram_free) == (256 << 20, 11 * GIB)
    assert look(None, CARD, probe_pinning=False).pinnable is None
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------------------- disk


def weight_file(path: Path, megabytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(random.randbytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return path


def test_the_disk_is_read(tmp_path: Path) -> None:
    weight_file(tmp_path / "fp8" / "block_0.safetensors", 48)
    weight_file(tmp_path / "model.pth", 32)
    before = time.perf_counter()
    found = probe_disk(tmp_path, sample_bytes=64 << 20)
    print(f"{(found.speed or 0) / 1e6:.0f} MB/s, {found.source}, {time.perf_counter() - before:.2f} s")
    assert found.speed is not None and found.speed > 1e6
    assert found.source.startswith("read ") and " MB of " in found.source
    megabytes = int(found.source.split()[1])
    assert 4 <= megabytes <= 68  # at most the sample, at least a piece


def test_the_time_is_boxed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_file(tmp_path / "a.safetensors", 80)
    read = os.preadv

    def slowly(fd: int, buffers: list[mmap.mmap], offset: int) -> int:
        time.sleep(0.05)
        return read(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", slowly)
    before = time.perf_counter()
    found = probe_disk(tmp_path, seconds=0.1)
    assert time.perf_counter() - before < 1.5
    assert found.speed is not None
    # 4 readers, a piece of 4 MiB in 50 ms each: what the clock says, not what the disk could do
    print(f"{found.speed / 1e6:.0f} MB/s of at most {4 * 4.2 / 0.05:.0f}")
    assert found.speed < 4 * (4 << 20) / 0.05


def test_a_read_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_file(tmp_path / "a.safetensors", 64)
    monkeypatch.setattr(disk, "_has_direct", lambda path: False)
    monkeypatch.setattr(disk, "_PATIENCE", 0.2)
    forever = threading.Event()
    monkeypatch.setattr(disk.os, "preadv", lambda *arguments: forever.wait(10) and 0)
    before = time.perf_counter()
    found = probe_disk(tmp_path, seconds=0.1)
    forever.set()
    assert time.perf_counter() - before < 2
    assert found.speed is None and "no piece of 4 MiB came within 0.3 s" in found.source


def test_reading_faults_are_told_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_file(tmp_path / "a.safetensors", 64)
    monkeypatch.setattr(disk, "_has_direct", lambda path: False)

    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.os, "preadv", broken)
    found = probe_disk(tmp_path)
    assert found.speed is None and "Input/output error" in found.source


def test_what_came_from_the_page_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_file(tmp_path / "a.safetensors", 64)
    monkeypatch.setattr(disk, "_has_direct", lambda path: False)
    monkeypatch.setattr(disk, "_read_bytes", lambda: 1000)  # nothing was read from a device
    monkeypatch.setattr(disk, "filesystem", lambda path: "ext4")
    assert probe_disk(tmp_path).source.endswith("of ext4; 100 % of it was in the page cache")
    monkeypatch.setattr(disk, "_read_bytes", lambda: None)
    assert "is not known" in probe_disk(tmp_path).source
    monkeypatch.setattr(disk, "filesystem", lambda path: "tmpfs")
    assert probe_disk(tmp_path).source.endswith("of tmpfs, which is in memory")


def test_nothing_to_measure(tmp_path: Path) -> None:
    assert "no weight file" in probe_disk(tmp_path).source
    assert "no weight file" in probe_disk(tmp_path / "absent").source
    (tmp_path / "small.safetensors").write_bytes(b"x" * 5000)
    found = probe_disk(tmp_path)
    assert found.speed is None and "too small" in found.source


def test_which_files(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 10), ("sub/b.pth", 30), ("c.txt", 99), (".hidden/d.pth", 99)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "sub" / "b.pth")
    (tmp_path / "broken.pth").symlink_to(tmp_path / "nowhere")
    real = tmp_path.resolve()
    assert largest_files(tmp_path) == [(real / "sub" / "b.pth", 30), (real / "a.safetensors", 10)]
    assert largest_files(tmp_path / "a.safetensors") == [(real / "a.safetensors", 10)]


def test_file_system_of_a_path(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    inner = str(tmp_path / "in ner").replace(" ", "\\040")
    mounts.write_text(
        "1 1 8:1 / / rw - ext4 /dev/sda rw\nodd\n"
        f"2 1 0:5 / {tmp_path} rw shared:1 - xfs /dev/sdb rw\n3 1 0:6 / {inner} rw - tmpfs tmpfs rw\n"
    )
    (tmp_path / "in ner").mkdir()
    assert filesystem(tmp_path / "x", mounts) == "xfs"
    assert filesystem(tmp_path / "in ner" / "x", mounts) == "tmpfs"
    assert filesystem(Path("/elsewhere"), mounts) == "ext4"
    assert filesystem(tmp_path, tmp_path / "absent") is None


def test_no_torch() -> None:
    code = "import runtime.memory.machine, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in found.stdout.split()
