"""Conversions that are broken off, repeated or interfered with, or that do not fit: what is left."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.checkpoint import making, open_checkpoint
from runtime.checkpoint.conversion import plan_conversion
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.checkpoint.making import STATE_FILE, Outcome, convert
from runtime.errors import OutputError, WeightsError
from runtime.transformer import Transformer, TransformerConfig
from tests.unit.checkpoint_fixtures import tensors_of
from tests.unit.test_cli_process import command, environment

PATIENCE = 60
FP32 = Recipe("transformer", "fp32", other_dtype=None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    write_layout(path, tensors_of("transformer", 81), FP32, "single")
    return path


def run(source: Path, target: Path, to: Any = "fp8", **options: Any) -> Outcome:
    return convert(plan_conversion(source, target, to), **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stop_after(count: int) -> Callable[[int], None]:
    seen = [0]

    def on_bytes(_: int) -> None:
        seen[0] += 1
        if seen[0] == count:
            raise KeyboardInterrupt

    return on_bytes


def broken(source: Path, target: Path, tensors: int) -> list[str]:
    """A conversion that is interrupted after so many tensors; the names of what it leaves."""
    with pytest.raises(KeyboardInterrupt):
        run(source, target, on_bytes=stop_after(tensors))
    return sorted(path.name for path in target.parent.rglob("*") if path != source and path.is_file())


def test_deterministic_whatever_the_number_of_threads(source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run(source, tmp_path / f"blocks{threads}", "fp8")
            run(source, tmp_path / f"single{threads}" / "x.safetensors", "int8")
    finally:
        torch.set_num_threads(before)
    for name in ("blocks", "single"):
        one, two, three = (contents(tmp_path / f"{name}{threads}") for threads in (1, 2, 3))
        assert one == two == three
    encoder = tmp_path / "t5.pth"
    torch.save(tensors_of("text_encoder", 82), encoder)
    run(encoder, tmp_path / "a" / "t5-fp8.pth")
    run(encoder, tmp_path / "b" / "t5-fp8.pth")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("tensors", [1, 27, 28, 60, 81, 95])
def test_a_broken_run_goes_on(source: Path, tmp_path: Path, tensors: int) -> None:
    """Whole files only, none of them made twice, and at the end the same bytes as in one go."""
    target = tmp_path / "broken"
    left = broken(source, target, tensors)
    finished = [name for name in left if name.startswith("block_")]
    assert set(left) == {STATE_FILE, "config.json", *finished}
    assert len(finished) == (tensors - 1) // 27  # a block has 27 tensors
    with pytest.raises(WeightsError, match=r"missing|no Wan|expected"):
        open_checkpoint(target, "transformer")
    stamps = {name: (target / name).stat().st_mtime_ns for name in finished}
    started: list[tuple[int, int]] = []
    outcome = run(source, target, on_start=lambda total, kept: started.append((total, kept)))
    assert outcome.kept == len(finished) == started[0][1]
    assert stamps == {name: (target / name).stat().st_mtime_ns for name in finished}
    whole = run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")
    assert outcome.files == whole.files and len(outcome.layers) == 30  # the kept files' errors too


def test_a_finished_file_that_was_damaged_is_made_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    broken(source, target, 60)
    data = bytearray((target / "block_0.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "block_0.safetensors").write_bytes(data)
    assert run(source, target).kept == 1
    run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


def _touched(source: Path, target: Path) -> None:
    os.utime(source, ns=(1, 1))


def _other_source(source: Path, target: Path) -> None:
    write_layout(source, tensors_of("transformer", 83), FP32, "single")


def _scribbled(source: Path, target: Path) -> None:
    (target / STATE_FILE).write_text("{")


def _wrong_types(source: Path, target: Path) -> None:
    state = json.loads((target / STATE_FILE).read_text())
    state["files"]["block_0.safetensors"]["layers"][0] = {"name": 5}
    (target / STATE_FILE).write_text(json.dumps(state))


@pytest.mark.parametrize("change", [_touched, _other_source, _scribbled, _wrong_types])
def test_what_another_run_left_is_not_gone_on_with(
    source: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    target = tmp_path / "out"
    broken(source, target, 60)
    change(source, target)
    with pytest.raises(OutputError, match="unfinished conversion of another source or with other settings"):
        run(source, target)
    assert run(source, target, overwrite=True).kept == 0
    run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


def test_other_settings_are_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    broken(source, tmp_path / "out", 60)
    with pytest.raises(OutputError, match="other settings"):
        run(source, tmp_path / "out", "int8")


def test_existing_output_is_not_written_over(source: Path, tmp_path: Path) -> None:
    target, single = tmp_path / "out", tmp_path / "x.safetensors"
    run(source, target)
    run(source, single)
    before = contents(target), single.read_bytes()
    for place in (target, single):
        with pytest.raises(OutputError, match=r"already.*--overwrite"):
            run(source, place, "int8")
    assert (contents(target), single.read_bytes()) == before
    (target / "models_t5.pth").write_bytes(b"a companion")
    third = (target / "block_2.safetensors").read_bytes()
    (target / "block_3.safetensors").write_bytes(third)  # of a larger model
    for place in (target, single):
        run(source, place, "int8", overwrite=True)
        assert open_checkpoint(place, "transformer").quantization == "int8"
    assert {path.name for path in target.iterdir()} == {*before[0], "models_t5.pth"}


def test_an_interrupted_overwrite_leaves_no_mixture(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(source, target)
    with pytest.raises(KeyboardInterrupt):
        run(source, target, overwrite=True, on_bytes=stop_after(40))
    assert {path.name for path in target.iterdir()} == {STATE_FILE, "config.json", "block_0.safetensors"}


def test_places_that_belong_to_another_model(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"ffn_dim": 8960}))
    for place in (target, target / "x.safetensors"):
        with pytest.raises(OutputError, match=r"config\.json is of another model"):
            run(source, place)
    assert run(source, target, overwrite=True).kept == 0
    (tmp_path / "other").mkdir()
    run(source, tmp_path / "other" / "distill_model.safetensors", "bf16")
    with pytest.raises(OutputError, match=r"another transformer \(distill_model\.safetensors\)"):
        run(source, tmp_path / "other", overwrite=True)
    with pytest.raises(OutputError, match="is a file; expected a new directory"):
        (tmp_path / "file").write_text("")
        run(source, tmp_path / "file")


@pytest.mark.parametrize("name", ["out", "x.safetensors"])
def test_too_little_space_is_told_first(
    source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_conversion(source, tmp_path / "place" / name, "fp8")
    for free, fits in ((plan.nbytes, False), (plan.nbytes + 2**20, True)):
        monkeypatch.setattr(making.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            written = sum(making_.bytes for making_ in convert(plan).files.values())
            assert written == plan.nbytes
        else:
            with pytest.raises(OutputError, match=r"needs 0\.00 GiB and .* free; make room"):
                convert(plan)
            assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("name", ["x.safetensors", "out", "x.pth"])
def test_a_full_disk_leaves_no_half_file(source: Path, tmp_path: Path, name: str) -> None:
    """A limit on the size of files is the full disk that a test can have."""
    if name == "x.pth":
        source = tmp_path / "t5.pth"
        torch.save(tensors_of("text_encoder", 84), source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            run(source, tmp_path / "place" / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    left = {path.name for path in (tmp_path / "place").rglob("*") if path.is_file()}
    assert left <= {"config.json", STATE_FILE}


def test_two_conversions_do_not_fight(source: Path, tmp_path: Path) -> None:
    with (tmp_path / ".out.convert.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="Another conversion is writing"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out")
    assert not (tmp_path / ".out.convert.lock").exists()


def large(path: Path, layers: int = 8, dim: int = 512) -> int:
    """A checkpoint of many matrices, none of them large; its bytes."""
    config = TransformerConfig(dim, 2 * dim, num_heads=dim // 128, num_layers=layers, text_dim=64)
    with torch.device("meta"):
        shapes = Transformer(config).bfloat16().state_dict()
    generator = torch.Generator().manual_seed(85)
    noise = torch.randn(6 * dim * dim, generator=generator).bfloat16()  # one for all: time is short
    tensors = {name: noise[: t.numel()].reshape(t.shape) for name, t in shapes.items()}
    write_layout(path, tensors, Recipe("transformer", "bf16"), "single")
    return sum(t.nbytes for t in tensors.values())


def test_kill_9(tmp_path: Path) -> None:
    """A real process, killed among its blocks; another one finishes what it began."""
    source, target = tmp_path / "source.safetensors", tmp_path / "out"
    large(source)
    arguments = command("weights", "convert", source, target, "--to", "fp8", "--json")
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (target / "block_3.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (target / "non_block.safetensors").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("block_*")}
    kept = run(source, target).kept
    # the last one may have got its name before the record had it
    assert len(finished) - 1 <= kept <= len(finished) and kept >= 3
    assert sum((target / name).stat().st_mtime_ns == stamp for name, stamp in finished.items()) == kept
    run(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")


def test_kill_9_leaves_no_half_file_under_a_name(tmp_path: Path) -> None:
    large(tmp_path / "source.safetensors")
    target = tmp_path / "out" / "x.safetensors"
    arguments = command("weights", "convert", tmp_path / "source.safetensors", target, "--to", "int8")
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    part = target.parent / ".x.safetensors.part"
    deadline = time.monotonic() + PATIENCE
    while not part.exists() or part.stat().st_size < 10_000_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists() and not target.exists()
    run(tmp_path / "source.safetensors", target, "int8")
    assert {path.name for path in target.parent.iterdir()} == {"x.safetensors", "config.json"}
    assert open_checkpoint(target, "transformer").quantization == "int8"


MEASURE = """
import sys, threading, time
from pathlib import Path
from runtime.checkpoint.conversion import plan_conversion
from runtime.checkpoint.making import convert
def host_anonymous():  # resident bytes of the process's own, without mapped files
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024
over, peak = threading.Event(), [0]
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], host_anonymous())
        time.sleep(0.002)
threading.Thread(target=watch).start()
paths = [Path(word) for word in sys.argv[1:]]
for source, target in zip(paths[::2], paths[1::2]):  # the first one warms up
    before = peak[0] = host_anonymous()
    convert(plan_conversion(source, target, "int8"))
    print(peak[0] - before)
over.set()
"""


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Tensors of 3 MB at most, and slices of rows, however large the whole is; a .pth as well."""
    small, blocks, encoder = tmp_path / "small.safetensors", tmp_path / "s.safetensors", tmp_path / "t5.pth"
    write_layout(small, tensors_of("transformer", 87), Recipe("transformer", "bf16"), "single")
    totals = [large(blocks, layers=14), _large_encoder(encoder)]
    pairs = [small, tmp_path / "a" / "x.safetensors", blocks, tmp_path / "b", encoder, tmp_path / "c.pth"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, pairs)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for total, peak in zip(totals, done.stdout.split()[1:], strict=True):
        print(f"{total / 1e6:.0f} MB converted in {int(peak) / 1e6:.1f} MB")
        assert total > 90e6 and int(peak) < 45e6


def _large_encoder(path: Path) -> int:
    """A T5 of 18 blocks of width 512; its bytes."""
    noise = torch.randn(1024 * 512, generator=torch.Generator().manual_seed(88)).bfloat16()
    tensors = {"token_embedding.weight": noise[: 40 * 512].view(40, 512), "norm.weight": noise[:512]}
    shapes = {f"attn.{m}": (512, 512) for m in "qkvo"} | {"ffn.gate.0": (1024, 512), "ffn.fc1": (1024, 512)}
    small = {"norm1": (512,), "norm2": (512,), "pos_embedding.embedding": (32, 8)}
    for n in range(18):
        for name, shape in (shapes | {"ffn.fc2": (512, 1024)} | small).items():
            part = noise[: torch.Size(shape).numel()]
            tensors[f"blocks.{n}.{name}.weight"] = part.view(shape).clone()
    torch.save(tensors, path)
    return sum(t.nbytes for t in tensors.values())
