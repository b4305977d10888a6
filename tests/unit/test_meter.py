"""The meter: seconds and peaks are those of what ran, on the host and (with a stand-in) on a device."""

import mmap
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.memory import meter
from runtime.memory.meter import PhaseMeter, host_anonymous, host_peak, host_resident

MIB = 1 << 20


def test_peak_outlives_the_allocation() -> None:
    # A process of its own: whatever pytest has allocated and freed before would hide the rise.
    code = f"""
from runtime.memory.meter import host_peak, host_resident
before = host_peak()
block = bytearray({96 * MIB})
during = host_resident()
del block
assert host_peak() - before > {90 * MIB}, (before, host_peak())
assert during - host_resident() > {90 * MIB}
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_mapped_files_are_not_the_process_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (64 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        resident, anonymous = host_resident(), host_anonymous()
        assert sum(mapped[:: mmap.PAGESIZE]) == 64 * MIB // mmap.PAGESIZE
        assert host_resident() - resident > 50 * MIB
        assert host_anonymous() - anonymous < 10 * MIB


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_proc = host_peak()
    monkeypatch.setattr(meter, "STATUS", tmp_path / "absent")
    assert host_peak() >= with_proc * 0.9  # ru_maxrss in the right unit; may be inherited, hence larger
    assert host_peak() < with_proc * 100
    assert host_resident() == host_anonymous() == host_peak()


def test_phases_on_the_host() -> None:
    m = PhaseMeter()
    with m.phase("text"):
        time.sleep(0.02)
    with m.phase("denoise"):
        block = np.ones(32 * MIB, np.uint8)
    text, denoise = m.phases
    assert (text.name, denoise.name) == ("text", "denoise")
    assert 0.02 <= text.seconds < 2
    assert denoise.host_resident - text.host_resident > 25 * MIB
    assert denoise.host_peak >= denoise.host_resident
    assert denoise.device_allocated == denoise.device_reserved == 0
    assert m.total.seconds == text.seconds + denoise.seconds
    assert m.total.host_peak == denoise.host_peak
    assert block.sum() == 32 * MIB


def test_a_phase_that_raises_is_recorded() -> None:
    m = PhaseMeter()
    with pytest.raises(KeyError), m.phase("decode"):
        raise KeyError
    assert [phase.name for phase in m.phases] == ["decode"]
    with m.phase("again"):
        pass
    assert len(m.phases) == 2


def test_phases_do_not_nest() -> None:
    m = PhaseMeter()
    nested = pytest.raises(RuntimeError, match="'inner' begins inside phase 'outer'")
    with nested, m.phase("outer"), m.phase("inner"):
        pass
    assert [phase.name for phase in m.phases] == ["outer"]


def test_device_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    peaks = {"allocated": 0, "reserved": 0}
    cuda = SimpleNamespace(
        synchronize=lambda device: calls.append(f"synchronize {device}"),
        reset_peak_memory_stats=lambda device: peaks.update(allocated=5, reserved=7),
        max_memory_allocated=lambda device: peaks["allocated"],
        max_memory_reserved=lambda device: peaks["reserved"],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    m = PhaseMeter("cuda:1")
    with m.phase("denoise"):
        peaks.update(allocated=50, reserved=70)
    with m.phase("decode"):
        peaks.update(allocated=40, reserved=90)
    with m.phase("save"):
        pass
    assert [(p.device_allocated, p.device_reserved) for p in m.phases] == [(50, 70), (40, 90), (5, 7)]
    assert (m.total.device_allocated, m.total.device_reserved) == (50, 90)
    assert calls == ["synchronize cuda:1"] * 6
    with pytest.raises(KeyError), m.phase("broken"):
        raise KeyError
    assert len(calls) == 7  # no waiting for a device that may have faulted
