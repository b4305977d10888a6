"""The peak of host memory is that of what ran, and is remembered."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.memory import meter
from runtime.memory.meter import host_peak

MIB = 1 << 20


def test_peak_outlives_the_allocation() -> None:
    # A process of its own: whatever pytest has allocated and freed before would hide the rise.
    code = f"""
from runtime.memory.meter import host_peak
before = host_peak()
block = bytearray({96 * MIB})
del block
assert {90 * MIB} < host_peak() - before < {120 * MIB}, (before, host_peak())
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_proc = host_peak()
    monkeypatch.setattr(meter, "STATUS", tmp_path / "absent")
    assert host_peak() >= with_proc * 0.9  # ru_maxrss in the right unit; may be inherited, hence larger
    assert host_peak() < with_proc * 100
