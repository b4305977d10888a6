"""Disks that fail, crawl or vanish while a model runs: one sentence, no thread left behind, and no wait."""

import errno
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.errors import WeightsError
from runtime.memory.feeder import JOIN_SECONDS
from runtime.memory.source import PAGE
from tests.unit.stream_fixtures import (
    Faults,
    Placed,
    distance,
    inputs_of,
    resident,
    streamed,
    threads_of,
    written,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("faults"), "transformer", "int8", "blocks")


@pytest.fixture
def checkpoint(source: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy that a test may damage."""
    shutil.copytree(source.path, tmp_path / "model")
    return open_checkpoint(tmp_path / "model", "transformer")


@pytest.fixture(scope="module")
def expected(source: Checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        return resident(source)(*inputs_of("transformer"))


@torch.inference_mode()
def run(model: nn.Module) -> torch.Tensor:
    return model(*inputs_of("transformer"))


@pytest.mark.parametrize(
    "system", [{"short": 1}, {"cached": True, "short": 1}, {"direct": False, "short": 2}]
)
def test_short_reads_change_nothing(
    checkpoint: Checkpoint, expected: torch.Tensor, system: dict[str, Any]
) -> None:
    faults = Faults(**system)
    with streamed(checkpoint, Placed((), (1,), 1), system=faults) as (model, stream):
        for _ in range(2):
            assert distance(run(model), expected) == 0
    counts = stream.counts.reads
    assert counts.disk_bytes + counts.cached_bytes >= 5 * stream._stored[0].stored_bytes
    assert counts.cached_bytes or faults.reads > 100


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EIO, "check the disk"), (errno.ESTALE, "mount it again")]
)
def test_an_error_of_the_disk_is_raised_at_the_next_block_and_once(
    checkpoint: Checkpoint, expected: torch.Tensor, number: int, words: str
) -> None:
    system = Faults(error=number)
    with streamed(checkpoint, system=system) as (model, stream):
        stream.expect(1)
        assert distance(run(model), expected) == 0
        system.fail_after = system.reads + 5
        with pytest.raises(
            WeightsError, match=rf"cannot be read at tensor blocks\.\d\.[a-z0-9_.]+\.weight: .*{words}"
        ):
            run(model)
        system.fail_after = None  # it was a loose cable
        for _ in range(2):
            assert distance(run(model), expected) == 0


def test_an_error_that_came_while_nobody_waited_is_told_at_the_next_pass(checkpoint: Checkpoint) -> None:
    system = Faults()
    with streamed(checkpoint, system=system) as (model, stream):
        stream.expect(1)
        run(model)
        system.fail_after = system.reads
        stream.expect(1)  # the next pass is fetched now, in vain
        deadline = time.monotonic() + 5
        while stream._feeder._failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(WeightsError, match="Input/output error"):
            run(model)


def test_an_error_while_residents_load_is_the_loader_s(checkpoint: Checkpoint) -> None:
    system = Faults(fail_after=3)
    before = threading.active_count()
    with (
        pytest.raises(WeightsError, match="Input/output error"),
        streamed(checkpoint, Placed((0, 1)), system=system),
    ):
        pass
    gc.collect()
    assert threading.active_count() == before and system.open_files == 0


def test_a_file_that_is_gone_is_told_before_anything_runs(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "block_2.safetensors").unlink()
    with (
        pytest.raises(WeightsError, match=r"block_2\.safetensors (is gone|cannot be read)"),
        streamed(checkpoint),
    ):
        pass


def test_files_may_be_removed_or_replaced_once_they_are_open(
    checkpoint: Checkpoint, expected: torch.Tensor
) -> None:
    with streamed(checkpoint) as (model, _):
        for number in range(3):
            file = checkpoint.path / f"block_{number}.safetensors"
            if number == 1:
                other = file.with_suffix(".other")
                other.write_bytes(os.urandom(file.stat().st_size))
                other.replace(file)
            else:
                file.unlink()
        for _ in range(2):
            assert distance(run(model), expected) == 0


@pytest.mark.parametrize("damage", ["cut", "written over"])
def test_a_file_that_is_damaged_while_it_is_used(checkpoint: Checkpoint, damage: str) -> None:
    with streamed(checkpoint, Placed((), (), 1)) as (model, stream):
        stream.expect(1)
        run(model)
        file = checkpoint.path / "block_1.safetensors"
        if damage == "cut":
            os.truncate(file, file.stat().st_size // 2)
            words = r"block_1\.safetensors (ends inside|changed while) "
        else:
            with file.open("rb+") as opened:
                opened.seek(file.stat().st_size - 100)
                opened.write(os.urandom(100))
            words = r"block_1\.safetensors changed while "
        with pytest.raises(WeightsError, match=words):
            run(model)


def test_a_fault_in_a_reader_that_is_none_of_the_disk_s_is_not_hidden(
    checkpoint: Checkpoint, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(checkpoint) as (model, stream):
        with monkeypatch.context() as patch:
            patch.setattr(stream._reader, "_read", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model)
        with monkeypatch.context() as patch:
            patch.setattr(stream._feeder.lane, "copy", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model)
        assert distance(run(model), expected) == 0


def test_a_slow_disk_is_only_slow(checkpoint: Checkpoint, expected: torch.Tensor) -> None:
    with streamed(checkpoint, system=Faults(delay=0.002)) as (model, stream):
        stream.expect(1)
        assert distance(run(model), expected) == 0
        assert stream.counts.waits == 3 and stream.counts.wait_seconds > 0.01
        assert stream.counts.reads.disk_speed is not None


@pytest.mark.parametrize("where", ["read", "chunk", "slot", "idle"])
def test_close_does_not_wait_for_what_the_threads_wait_for(source: Checkpoint, where: str) -> None:
    system = Faults(delay=2.0 if where == "read" else 0.0)
    chunks = 1 if where == "chunk" else 4
    began = time.monotonic()
    with streamed(source, Placed((), (), 1), system=system, chunks=chunks, readers=3) as (_, stream):
        if where == "idle":
            stream.expect(0)
        stream.start()
        system.slept.wait(2) if where == "read" else time.sleep(0.05)
        threads = threads_of(stream)
        closing = time.monotonic()
        stream.close()
        took = time.monotonic() - closing
        print(f"close took {took:.3f} s, with threads waiting for a {where}")
        assert took < (1.0 if where == "read" else 0.6)
        if where == "read":
            # They sleep inside of the system; nothing they could touch is gone but their own chunk.
            assert any(thread.is_alive() for thread in threads) and system.open_files
            stream.close()
            for thread in threads:
                thread.join(4)
            stream.close()
            assert system.open_files == 0
    assert time.monotonic() - began < 6


def test_close_from_the_middle_of_a_pass(source: Checkpoint) -> None:
    with streamed(source, Placed((1,), (0,), 1), system=Faults(delay=0.001)) as (_, stream):
        for index, _block in enumerate(stream):
            if index == 1:
                stream.close()
                break
    assert stream.device_bytes == 0 and JOIN_SECONDS < 1


INTERRUPTED = """
    import sys, threading
    from pathlib import Path
    from runtime.checkpoint import open_checkpoint
    from tests.unit.stream_fixtures import *

    checkpoint = open_checkpoint(Path(sys.argv[1]), "transformer")
    with streamed(checkpoint, system=Faults(delay=30.0)) as (model, stream):
        stream.start()
        stream._feeder.reader.files._system.slept.wait()
        print("reading", flush=True)
        try:
            model(*inputs_of("transformer"))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise SystemExit(130)
"""


def test_ctrl_c_while_a_read_hangs_ends_the_program_at_once(source: Checkpoint) -> None:
    root = Path(__file__).resolve().parents[2]
    code = textwrap.dedent(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source.path)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.stdout.readline() == "interrupted\n"
    answered = time.monotonic() - began
    process.communicate(timeout=10)
    ended = time.monotonic() - began
    print(f"answered after {answered:.2f} s, ended after {ended:.2f} s")
    assert answered < 1 and ended < 6, "the read takes 30 s"


def test_pieces_split_inside_a_matrix(source: Checkpoint) -> None:
    with streamed(source, chunk=3 * PAGE) as (_, stream):
        pieces = stream._feeder._pieces[0]
        assert max(sum(p.matrix is m for p in pieces) for m in stream._stored[0].matrices) >= 5
        for matrix in stream._stored[0].matrices:
            parts = [p for p in pieces if p.matrix is matrix]
            assert sum(p.nbytes for p in parts) == matrix.nbytes
            assert all(a.position + a.nbytes == b.position for a, b in itertools.pairwise(parts))
            assert max(p.nbytes for p in parts) <= PAGE and parts[0].position % 256 == 0
