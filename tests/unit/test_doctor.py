"""`t2v doctor`: every check with a made-up machine, good, poor and broken; and the command as a whole."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrypoint import checks, doctor, findings, gpu_checks, kernel_trials, surroundings
from entrypoint.findings import Finding, Scene, guarded, split_advice
from runtime.device import Gpu, Inventory
from runtime.errors import DeviceError, OutputError, WeightsError
from runtime.linear import Fp8Linear
from runtime.memory.machine import Machine
from tests import tiny
from tests.conftest import Run
from tests.unit.test_device import RTX3060, RTX4090, card, install_driver

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
RICH = Machine(None, 0, 64 * GIB, 50 * GIB, "host", None, "not tried", 3e9, "read 256 MB of ext4", False, 16)
NO_DRIVER = Inventory(
    reason="there is no NVIDIA driver (libnvidia-ml.so.1 was not found); in a container, do"
)


def scene(gpu: Gpu | None = None, stock: Inventory | None = None, **machine: Any) -> Scene:
    found = stock or (Inventory((gpu,), (13, 0)) if gpu else NO_DRIVER)
    return Scene(found, gpu, replace(RICH, gpu=gpu, **machine), Path("/weights"), None)


def only(check: findings.Check, of: Scene) -> Finding:
    """The one finding of a check, which is well-formed."""
    found = list(check(of))
    assert len(found) == 1
    return well_formed(found[0])


def well_formed(one: Finding) -> Finding:
    assert (one.state == "ok") == (one.fix == "")
    assert (one.state == "fail") == (one.error is not None)
    assert one.found and "\n" not in one.found + one.fix
    assert not one.fix or (one.fix[0].isupper() and one.fix.endswith("."))
    return one


# -------------------------------------------------------------------------------------- programs and memory


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(checks.check_python, scene()).state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    found = only(checks.check_python, scene())
    assert found.state == "fail" and found.error is DeviceError and "3.11" in found.fix


@pytest.mark.parametrize(
    ("version", "cuda", "gpu", "state", "says"),
    [
        ("2.8.0+cu128", (12, 8), RTX4090, "ok", "built for CUDA 12.8"),
        ("2.13.0+cpu", None, None, "ok", "built without CUDA"),
        ("2.13.0+cpu", None, RTX4090, "fail", "there is a GPU"),
        ("2.5.1", (12, 4), RTX4090, "warn", "2.5.1"),
        ("2.14.0.dev1", (13, 0), None, "warn", "2.14.0"),
        ("2.9.1", (12, 8), RTX4090, "warn", "doubles the decode's memory"),
    ],
)
def test_torch(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: Any, gpu: Gpu | None, state: str, says: str
) -> None:
    monkeypatch.setattr(checks, "version", lambda name: version)
    monkeypatch.setattr(checks, "torch_cuda", lambda: cuda)
    found = only(checks.check_torch, scene(gpu))
    assert (found.state, says in found.found) == (state, True)


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise checks.PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", absent)
    assert only(checks.check_torch, scene()).error is DeviceError


def test_the_torch_that_is_checked_for_is_the_one_that_is_required() -> None:
    oldest, newest = (".".join(map(str, number)) for number in checks.TORCH)
    after = f"2.{checks.TORCH[1][1] + 1}"
    assert f'"torch>={oldest},<{after}"' in (ROOT / "pyproject.toml").read_text(), newest


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert "not installed" in only(checks.check_compiler, scene(RTX4090)).found
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert "/usr/bin/gcc" in only(checks.check_compiler, scene(RTX4090)).found
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(checks.check_compiler, scene(RTX4090)).state == "warn"
    assert only(checks.check_compiler, scene()).state == "ok"


@pytest.mark.parametrize(
    ("machine", "state", "says"),
    [
        ({}, "ok", "50.0 GiB available of 64.0 GiB"),
        ({"ram_available": 5 * GIB}, "warn", "Close other programs"),
        ({"ram_available": 5 * GIB, "ram_source": "WSL2", "wsl": True}, "warn", ".wslconfig"),
        ({"ram_available": 5 * GIB, "ram_source": "cgroup v2 /a", "wsl": True}, "warn", "--memory"),
        ({"ram_available": 9 * GIB, "ram_source": "cgroup v1 /a"}, "ok", "limited by cgroup v1 /a"),
    ],
)
def test_memory(machine: dict[str, Any], state: str, says: str) -> None:
    found = only(checks.check_memory, scene(**machine))
    assert found.state == state and says in found.found + found.fix


@pytest.mark.parametrize(
    ("machine", "state", "says"),
    [
        ({"pinnable": 512 << 20, "pin_error": None}, "ok", "512.0 MiB could be pinned"),
        ({"pinnable": 300 << 20, "pin_error": None}, "ok", "300.0 MiB"),  # no more was asked for
        ({"pinnable": 128 << 20, "pin_error": "refused"}, "warn", "only 128.0 MiB: refused"),
        ({"pinnable": 0, "pin_error": "refused", "wsl": True}, "warn", "under WSL2"),
        ({"pinnable": None, "pin_error": "cuInit failed"}, "warn", "cuInit failed"),
    ],
)
def test_pinning(machine: dict[str, Any], state: str, says: str) -> None:
    found = only(checks.check_pinning, scene(RTX4090, **machine))
    assert found.state == state and says in found.found + found.fix
    assert not list(checks.check_pinning(scene()))


@pytest.mark.parametrize(
    ("speed", "state"), [(3e9, "ok"), (0.2e9, "warn"), (None, "ok")], ids=["fast", "slow", "not measured"]
)
def test_disk(speed: float | None, state: str) -> None:
    found = only(checks.check_disk, scene(disk=speed))
    assert found.state == state and "read 256 MB of ext4" in found.found


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert only(checks.check_shared_memory, scene()).state == "ok"
    small = SimpleNamespace(f_blocks=16384, f_bavail=100, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    found = only(checks.check_shared_memory, scene())
    assert found.state == "warn" and "holds 16.0 MiB" in found.found
    monkeypatch.undo()
    monkeypatch.setattr(checks, "SHARED_MEMORY", tmp_path / "absent")
    assert only(checks.check_shared_memory, scene()).state == "ok"


def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert checks.container(tmp_path) is None
    (tmp_path / "proc" / "self").mkdir(parents=True)
    for text, name in (
        ("0::/kubepods/pod1", "Kubernetes"),
        ("4:memory:/docker/0a", "Docker"),
        ("0::/", None),
    ):
        (tmp_path / "proc" / "self" / "cgroup").write_text(text)
        assert checks.container(tmp_path) == name
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".containerenv").touch()
    assert checks.container(tmp_path) == "Podman"
    (tmp_path / ".dockerenv").touch()
    assert checks.container(tmp_path) == "Docker"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert checks.container(tmp_path) == "Kubernetes"
    assert only(checks.check_place, scene(wsl=True)).found == "Kubernetes in WSL2, 16 processors"


# ------------------------------------------------------------------------------------- directories, weights


def test_directories(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2V_CACHE", str(tmp_path / "cache"))
    found = {one.name: well_formed(one) for one in checks.check_directories(scene())}
    assert {name: one.state for name, one in found.items()} == {"outputs": "ok", "cache": "ok"}
    assert str(workplace / "outputs") in found["outputs"].found and not (workplace / "outputs").exists()
    monkeypatch.setattr(checks, "writable", lambda path: False)
    outputs, cache = (well_formed(one) for one in checks.check_directories(scene()))
    assert (outputs.state, outputs.error, cache.state) == ("fail", OutputError, "warn")
    monkeypatch.setattr(checks, "writable", lambda path: True)
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert {one.state for one in checks.check_directories(scene())} == {"warn"}
    monkeypatch.setenv("T2V_CACHE", "none")
    monkeypatch.setenv("T2V_OUTPUT", str(tmp_path / "place" / "v.mp4"))
    outputs = only(checks.check_directories, scene())
    assert outputs.found.startswith(f"{tmp_path / 'place'},")


def test_writable(tmp_path: Path) -> None:
    assert findings.writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch(mode=0o600)
    assert not findings.writable(tmp_path / "file" / "below")


def weights_at(directory: Path, model: str | None = None) -> list[Finding]:
    of = replace(scene(), weights=directory, model=model)
    return [well_formed(one) for one in checks.check_weights(of)]


def test_no_weights(tmp_path: Path) -> None:
    (found,) = weights_at(tmp_path / "absent")
    assert found.state == "warn" and "there is no directory" in found.found
    (found,) = weights_at(tmp_path)
    assert found.state == "warn" and "no model in" in found.found and "t2v weights pull" in found.fix
    (found,) = weights_at(tmp_path / "absent", "wan2.1-t2v-14b-4step-int8")
    assert found.error is WeightsError and "--model wan2.1-t2v-14b-4step-int8" in found.fix
    (found,) = weights_at(tmp_path, "wan2.1-t2v-14b-4step-int8")
    assert found.error is WeightsError and "missing or wrong" in found.found


def test_the_demo_is_sound() -> None:
    (found,) = weights_at(Path("/nowhere"), "demo-fp8")
    assert found.state == "ok" and "ships with the program" in found.found


def test_weights_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build(tmp_path, ("fp8",))
    part = {one.name: one for one in weights_at(tmp_path)}["weights"]
    assert part.state == "warn" and "wan2.1-t2v-14b-4step-fp8: 38 files not there yet" in part.found
    source = tmp_path / "distill_fp8" / "block_0.safetensors"
    for number in range(2, 40):
        shutil.copy(source, source.with_name(f"block_{number}.safetensors"))
    (found,) = weights_at(tmp_path)
    assert found.state == "ok" and "no digests known" in found.found
    source.write_bytes(b"cut")
    (found,) = weights_at(tmp_path)
    assert found.error is WeightsError and "1 file missing or wrong, first distill_fp8/block_0" in found.found
    (tmp_path / checks.SYNTHETIC).write_text("{}")
    (found,) = weights_at(tmp_path)
    assert found.state == "warn" and "random numbers" in found.found


def test_the_variant_of_a_family_that_is_there_and_a_directory(tmp_path: Path) -> None:
    tiny.build(tmp_path, ("int8",))
    (found,) = weights_at(tmp_path, "wan2.1-t2v-14b-4step")
    assert "wan2.1-t2v-14b-4step-int8: 38 files missing" in found.found and found.error is WeightsError
    (found,) = weights_at(Path("/nowhere"), str(tmp_path))
    assert found.state == "ok" and f"{tmp_path}: int8, " in found.found
    (tmp_path / "distill_int8" / "Wan2.1_VAE.pth").unlink()
    (found,) = weights_at(Path("/nowhere"), str(tmp_path))
    assert found.error is WeightsError and "Wan2.1_VAE.pth" in found.found


def test_the_note_of_random_weights_has_its_name() -> None:
    from runtime.checkpoint.synth import NOTE_FILE

    assert checks.SYNTHETIC == NOTE_FILE  # which this file's torch-free checks cannot import


# ------------------------------------------------------------------------------------------- driver and card


def test_no_gpu_is_no_failure_but_a_gpu_without_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "cards", lambda: 0)
    assert only(gpu_checks.check_driver, scene()).state == "warn"
    monkeypatch.setattr(gpu_checks, "cards", lambda: 2)
    for wsl, box, says in (
        (True, None, "in Windows"),
        (False, "Docker", "--gpus all"),
        (False, None, "Install the NVIDIA driver"),
    ):
        monkeypatch.setattr(checks, "is_wsl", lambda wsl=wsl: wsl)
        monkeypatch.setattr(checks, "container", lambda box=box: box)
        found = only(gpu_checks.check_driver, scene())
        assert found.error is DeviceError and says in found.fix


def test_cards_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("a", "0x10de", "0x030000"),
        ("b", "0x10de", "0x040300"),
        ("c", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    (tmp_path / "gone").mkdir()
    assert gpu_checks.cards(tmp_path) == 1
    assert gpu_checks.cards(tmp_path / "absent") == 0


def test_a_broken_driver_fails() -> None:
    reason = "the NVIDIA driver was updated and its old kernel module still runs; reboot"
    found = only(gpu_checks.check_driver, scene(stock=Inventory(reason=reason)))
    assert found.error is DeviceError and found.fix == "Reboot."


def test_driver_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Inventory((RTX4090,), (12, 4))
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (12, 8))
    assert only(gpu_checks.check_driver, scene(RTX4090, stock)).state == "ok"
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (13, 0))
    found = only(gpu_checks.check_driver, scene(RTX4090, stock))
    assert found.error is DeviceError and "torch was built for 13.0" in found.found


def test_what_the_image_says_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (12, 8))
    said = [
        surroundings.Finding("driver", "The driver is old: update it.", DeviceError),
        surroundings.Finding("architecture", "Odd card; use image cu128.", None),
        surroundings.Finding("outputs", "not looked at here: x.", OutputError),
    ]
    monkeypatch.setattr(surroundings, "examine", lambda need: said)
    found = [well_formed(one) for one in gpu_checks.check_driver(scene(RTX4090))]
    assert [(one.name, one.state, one.fix) for one in found[1:]] == [
        ("image", "fail", "Update it."),
        ("image", "warn", "Use image cu128."),
    ]


def test_cards_and_their_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "holders", lambda gpu: ["python (pid 7, 9.0 GiB)", "Xorg (pid 8)"])
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (12, 4))
    busy = replace(RTX3060, index=1, free=3 * GIB)
    both = Inventory((RTX4090, busy), (13, 0))
    names = [well_formed(one) for one in gpu_checks.check_gpus(scene(RTX4090, both))]
    assert [(one.name, one.state) for one in names] == [
        *(("cuda:0", "ok"), ("cuda:0 memory", "ok"), ("cuda:1", "ok"), ("cuda:1 memory", "warn"))
    ]
    assert "profile rtx4090" in names[0].found and "weights fp8 (taken by default)" in names[0].found
    assert "taken" not in names[2].found
    assert "held by python (pid 7, 9.0 GiB), Xorg (pid 8)" in names[3].found and "refused" in names[3].fix
    half = replace(RTX4090, free=12 * GIB)
    assert "more speed" in list(gpu_checks.check_gpus(scene(half)))[1].fix
    for gpu, says in (
        (card("NVIDIA RTX 5090", 31.8, (12, 0)), "cu128"),
        (card("Tesla P4", 8, (6, 1)), "RTX 20"),
    ):
        found = well_formed(next(iter(gpu_checks.check_gpus(scene(gpu)))))
        assert says in found.fix
        assert found.state == ("warn" if gpu.capability < (7, 5) else "fail")


def test_who_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(pid: int, held: int | None) -> SimpleNamespace:
        return SimpleNamespace(pid=pid, usedGpuMemory=held)

    install_driver(monkeypatch, RTX4090)
    library = sys.modules["pynvml"]
    own = Path("/proc/self/comm").read_text().strip()
    compute = [process(os.getpid(), 2 * GIB), process(1 << 30, 9 * GIB)]
    for name, value in (
        ("nvmlDeviceGetHandleByUUID", lambda uuid: uuid),
        ("nvmlDeviceGetComputeRunningProcesses", lambda handle: compute),
        ("nvmlDeviceGetGraphicsRunningProcesses", lambda handle: [process(os.getpid(), None)]),
    ):
        monkeypatch.setattr(library, name, value, raising=False)
    assert gpu_checks.holders(RTX4090) == [
        f"a process (pid {1 << 30}, 9.0 GiB)",
        f"{own} (pid {os.getpid()}, 2.0 GiB)",
    ]
    monkeypatch.delattr(library, "nvmlDeviceGetGraphicsRunningProcesses")
    assert gpu_checks.holders(RTX4090) == []


# ---------------------------------------------------------------------------------------------- 8-bit kernels


def kernels(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], gpu: Gpu = RTX4090) -> Finding:
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (12, 8))
    monkeypatch.setattr(gpu_checks, "run_trials", lambda device: answer)
    return only(gpu_checks.check_kernels, scene(gpu))


def ways(fp8: str, int8: str) -> dict[str, Any]:
    listed = {"fp8": fp8.split(), "int8": int8.split()}
    return {"ways": {form: {w: w in listed[form] for w in kernel_trials.WAYS[form]} for form in listed}}


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels(monkeypatch, ways("unscaled dequantized", "integer"))
    assert found.state == "ok" and "fp8: unscaled, dequantized; int8: integer" in found.found
    assert kernels(monkeypatch, ways("dequantized", "integer")).state == "warn"
    assert kernels(monkeypatch, ways("dequantized", "integer"), RTX3060).state == "ok"  # takes int8
    assert kernels(monkeypatch, ways("", "integer")).error is DeviceError
    assert "CUDA error" in kernels(monkeypatch, {"error": "CUDA error"}).found
    assert not list(gpu_checks.check_kernels(scene()))


def test_trials_tell_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernel_trials.trials("cpu")
    assert found["fp8"]["dequantized"] and found["int8"]["dequantized"]
    right = Fp8Linear.dequantized
    monkeypatch.setattr(Fp8Linear, "dequantized", lambda self, rows: right(self, rows) * 1.1)
    assert not kernel_trials.trials("cpu")["fp8"]["dequantized"]
    monkeypatch.setattr(Fp8Linear, "dequantized", lambda self, rows: right(self, rows) * float("nan"))
    assert not kernel_trials.trials("cpu")["fp8"]["dequantized"]

    def refuses(self: Fp8Linear, rows: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Fp8Linear, "dequantized", refuses)
    assert not kernel_trials.trials("cpu")["fp8"]["dequantized"]


def test_ways_are_those_of_the_engine() -> None:
    for form, names in kernel_trials.WAYS.items():
        text = (ROOT / "runtime" / "linear" / f"{form}.py").read_text()
        assert all(f'"{name}"' in text for name in names if name != "dequantized"), form


def test_trials_run_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_checks.run_trials("cuda:77").keys() == {"error"}  # whichever reason torch has
    for code, says in (
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("raise SystemExit('no such thing')", "exit status 1, no such thing"),
        ("print('[]')", "no object"),
        ("import time; time.sleep(9)", "timed out"),
    ):
        run = subprocess.run

        def instead(command: list[str], code: str = code, run: Any = run, **options: Any) -> Any:
            return run([sys.executable, "-c", code], **options | {"timeout": 0.8})

        monkeypatch.setattr(subprocess, "run", instead)
        assert says in gpu_checks.run_trials("cuda:0")["error"]
        monkeypatch.setattr(subprocess, "run", run)


# ---------------------------------------------------------------------------------------------------- command


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken(of: Scene) -> Any:
        raise ValueError("odd\nmachine")

    (found,) = guarded("disk", broken, scene())
    assert well_formed(found).state == "warn" and "ValueError: odd" in found.found


def test_advice() -> None:
    assert split_advice("it is old; update it") == ("it is old", "Update it.")
    assert split_advice("A (b: c) is d: do e.") == ("A (b: c) is d", "Do e.")
    assert split_advice("plain") == ("plain", "")


@pytest.mark.parametrize("columns", [80, 120])
def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [
        findings.ok("memory", "50.0 GiB available of 64.0 GiB"),
        findings.warn(
            "cuda:0 memory", "3.0 GiB free of 12.0 GiB; held by " + "x " * 60, "End them. " + "y " * 40
        ),
    ]
    doctor._show(rows, as_json=False)
    out = capsys.readouterr()
    plain = [line.replace("\x1b[0m", "") for line in out.out.splitlines()]
    assert all(len(line) <= columns + 10 for line in plain)  # + colours
    assert any("-> End them." in line for line in plain)
    assert out.err.strip() == "t2v: nothing fails, 1 warning"


def test_the_command(t2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "look_around", lambda weights, model: replace(scene(), weights=weights, model=model)
    )
    monkeypatch.setattr(gpu_checks, "cards", lambda: 0)
    done = t2v("doctor", "--weights", tmp_path, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0
    assert events[-1] == {"event": "result", "ok": True, "warnings": 2, "failures": 0}
    assert {event["name"] for event in events[:-1]} >= {"torch", "driver", "memory", "weights", "outputs"}
    done = t2v("doctor", "--weights", tmp_path, "--model", "wan2.1-t2v-14b-4step-fp8")
    assert done.exit_code == WeightsError.exit_code and "1 of 11 checks failed, first weights" in done.stderr
    monkeypatch.setattr(gpu_checks, "cards", lambda: 1)  # a device failure comes before one of weights
    done = t2v("doctor", "--weights", tmp_path, "--model", "wan2.1-t2v-14b-4step-fp8", "--json")
    assert done.exit_code == DeviceError.exit_code
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == "DeviceError"
    done = t2v("doctor", "--model", "wan9")
    assert done.exit_code == 2 and "No model is called" in done.stderr


def test_no_gpu_no_traceback_and_no_wait(tmp_path: Path) -> None:
    before = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "entrypoint", "doctor", "--weights", str(tmp_path)]
    env = {**os.environ, "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(f"{time.perf_counter() - before:.2f} s")
    assert done.returncode in (0, 5) and "Traceback" not in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
