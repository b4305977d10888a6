"""What a machine has, asked of a real driver: pinning before and after torch starts CUDA, `t2v doctor`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrypoint.kernel_trials import WAYS
from runtime.device import gpus
from runtime.memory.machine import look
from runtime.memory.pinning import STEP, probe_pinning

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "from runtime.memory.pinning import STEP, probe_pinning; found = probe_pinning(4 * STEP + 5)\n"
    "import torch; torch.ones(4, device='cuda').sum().item(); again = probe_pinning(2 * STEP)\n"
    "y = torch.randn(1 << 20, pin_memory=True).to('cuda', non_blocking=True); torch.cuda.synchronize()\n"
    "print(found.bytes, found.error, again.bytes, again.error, bool(torch.isfinite(y).all()))"
)


def test_pinning_leaves_torch_as_it_was() -> None:
    """In a process of its own, so that the first probe meets a driver that nobody has started."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr[-2000:])
    assert done.stdout.split() == [str(4 * STEP + 5), "None", str(2 * STEP), "None", "True"]


def test_pinning_beside_a_context_takes_no_memory_of_the_card() -> None:
    torch.ones(4, device="cuda").sum().item()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    assert probe_pinning(2 * STEP).bytes == 2 * STEP
    after = torch.cuda.mem_get_info()[0]
    print(f"free on the card: {before} before, {after} after")
    assert abs(before - after) < 32 << 20
    assert torch.ones(4, device="cuda").sum().item() == 4


def test_a_machine_with_a_card() -> None:
    found = look(None, gpus()[0])
    print(found)
    assert found.gpu is not None and 0 < found.vram_free <= found.gpu.total
    assert found.pinnable is not None and found.pinnable > 0


def test_doctor_finds_nothing_that_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "entrypoint", "doctor", "--json", "--weights", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines()) if "name" in row}
    for row in rows.values():
        print(row["state"], row["name"], row["found"], row["fix"])
    assert done.returncode == 0, done.stderr
    assert rows["cuda:0"]["state"] == "ok" and rows["8-bit kernels"]["state"] == "ok"
    assert all(form in rows["8-bit kernels"]["found"] for form in WAYS)
