"""Reading by offset: right bytes however the disk gives them, one sentence a fault, a clean page cache."""

import errno
import mmap
import os
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import WeightsError
from runtime.memory import source
from runtime.memory.source import PAGE, SLACK, ReadStopped, System, WeightFiles
from tests.unit.stream_fixtures import Faults, cached_pages, drop_cache

SIZE = 40 * PAGE + 1234


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    file = tmp_path_factory.mktemp("source") / "weights.safetensors"
    data = random.Random(1).randbytes(SIZE)
    file.write_bytes(data)
    drop_cache(file)
    return file, data


def copy_of(weights: tuple[Path, bytes], tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(weights[1])
    drop_cache(file)
    return file


def space_for(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes + SLACK))


SYSTEMS = {
    "as it is": System,
    "O_DIRECT": Faults,
    "O_DIRECT, short reads": lambda: Faults(short=2),
    "page cache": lambda: Faults(cached=True),
    "page cache, then O_DIRECT in short reads": lambda: Faults(cached=True, short=1),
    "buffered": lambda: Faults(direct=False),
    "buffered, short reads": lambda: Faults(direct=False, short=1),
}


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS.keys())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_bytes_are_those_of_the_file(
    weights: tuple[Path, bytes], system: type[System], data: st.DataObject
) -> None:
    file, content = weights
    begin = data.draw(st.integers(0, SIZE - 1))
    nbytes = data.draw(st.integers(0, SIZE - begin))
    extra = data.draw(st.integers(0, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "SLICE", data.draw(st.sampled_from([PAGE, 3 * PAGE, 5000, 2**20])))
        files = WeightFiles(system())
        found = files.read(file, begin, nbytes, space_for(nbytes + extra), "q")
        assert bytes(found) == content[begin : begin + nbytes]
        counts = files.counts
        assert counts.cached_bytes + counts.disk_bytes == nbytes
        files.close()


def test_the_last_bytes_of_a_file_and_nothing_behind(weights: tuple[Path, bytes]) -> None:
    file, content = weights
    for system in SYSTEMS.values():
        files = WeightFiles(system())
        assert bytes(files.read(file, SIZE - 7, 7, space_for(7), "q")) == content[-7:]
        with pytest.raises(WeightsError, match=r"weights.safetensors ends inside tensor q"):
            files.read(file, SIZE - 7, 8, space_for(8), "q")
        with pytest.raises(WeightsError, match="ends inside"):
            files.read(file, SIZE + 9 * PAGE, 8, space_for(8), "q")
        files.close()


def test_memory_that_is_not_aligned_is_read_into_all_the_same(weights: tuple[Path, bytes]) -> None:
    file, content = weights
    system = Faults()
    files = WeightFiles(system)
    space = space_for(9000 + 512)[512:]  # O_DIRECT would refuse it
    assert bytes(files.read(file, 100, 9000, space, "q")) == content[100:9100]
    with pytest.raises(ValueError, match=f"need a space of {10_000 + SLACK}"):
        files.read(file, 0, 10_000, space_for(9_999), "q")
    files.close()


def test_o_direct_that_opens_and_then_refuses_falls_back(weights: tuple[Path, bytes]) -> None:
    class Refusing(Faults):
        def read(self, fd: int, target: memoryview, offset: int) -> int:
            if len(target) % PAGE == 0 and offset % PAGE == 0:
                raise OSError(errno.EINVAL, "refused")
            return super().read(fd, target, offset)

    file, content = weights
    files = WeightFiles(Refusing())
    assert bytes(files.read(file, 5, 20_000, space_for(20_000), "q")) == content[5:20_005]
    files.close()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, "Input/output error; check the disk"),
        (errno.ESTALE, "network filesystem lost it: mount it"),
    ],
)
def test_errors_of_the_disk_are_one_sentence(weights: tuple[Path, bytes], number: int, words: str) -> None:
    files = WeightFiles(Faults(fail_after=1, error=number))
    files.read(weights[0], 0, 100, space_for(100), "blocks.0.q")
    with pytest.raises(
        WeightsError, match=rf"weights.safetensors cannot be read at tensor blocks.3.q: .*{words}"
    ):
        files.read(weights[0], 0, 100, space_for(100), "blocks.3.q")
    files.close()


def test_a_missing_file_says_so_when_it_is_opened(tmp_path: Path) -> None:
    files = WeightFiles()
    with pytest.raises(WeightsError, match=r"nowhere.safetensors is gone, .* put the weights back"):
        files.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(WeightsError, match=r"tensor head\.weight must be read from it"):
        files.read(tmp_path / "nowhere.safetensors", 0, 1, space_for(1), "head.weight")


def test_a_file_that_is_open_may_be_removed_or_replaced(weights: tuple[Path, bytes], tmp_path: Path) -> None:
    file = copy_of(weights, tmp_path)
    files = WeightFiles()
    files.open(file)
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    other.replace(file)
    assert bytes(files.read(file, 10, 5000, space_for(5000), "q")) == weights[1][10:5010]
    file.unlink()
    assert bytes(files.read(file, 77, 5000, space_for(5000), "q")) == weights[1][77:5077]
    files.close()


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_rows_are_those_of_the_file(weights: tuple[Path, bytes], system: type[System]) -> None:
    file, content = weights
    drop_cache(file)
    files = WeightFiles(system())
    offsets = [7, 3 * PAGE - 5, 20 * PAGE, SIZE - 1000]
    into = bytearray(4 * 1000)
    for _ in range(2):
        files.read_rows(file, offsets, memoryview(into), space_for(1000), "table")
        assert bytes(into) == b"".join(content[offset : offset + 1000] for offset in offsets)
    counts = files.counts
    assert counts.cached_bytes + counts.disk_bytes >= 2 * 4000
    files.read_rows(file, [], memoryview(b""), space_for(1000), "table")
    with pytest.raises(WeightsError, match="ends inside tensor table: it was cut"):
        files.read_rows(file, [0, SIZE - 10], memoryview(bytearray(2000)), space_for(1000), "table")
    files.close()


def test_rows_that_the_page_cache_holds_take_one_call_each(
    weights: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = weights
    file.read_bytes()
    system, calls = Faults(cached=True), list[int]()
    whole = system.read_cached

    def counted(fd: int, target: memoryview, offset: int) -> int:
        calls.append(offset)
        return whole(fd, target, offset)

    monkeypatch.setattr(system, "read_cached", counted)
    monkeypatch.setattr(system, "read", lambda *_: pytest.fail("read from the disk"))
    files, into = WeightFiles(system), bytearray(3 * 5000)
    files.read_rows(file, [100, 9000, 3 * PAGE], memoryview(into), space_for(5000), "table")
    assert calls == [100, 9000, 3 * PAGE] and files.counts.cached_bytes == 15000
    assert bytes(into[5000:10000]) == content[9000:14000]
    with file.open("rb+") as opened:
        opened.write(content[:1])  # the same byte, at another time
    with pytest.raises(WeightsError, match="changed while tensor table was read"):
        files.read_rows(file, [100], memoryview(into)[:5000], space_for(5000), "table")
    files.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_is_cut_or_written_over_is_an_error(
    weights: tuple[Path, bytes], tmp_path: Path, direct: bool
) -> None:
    file = copy_of(weights, tmp_path)
    files = WeightFiles(Faults(direct=direct))
    files.read(file, 0, SIZE, space_for(SIZE), "q")
    with file.open("rb+") as opened:
        opened.seek(200)
        opened.write(b"another weight")
    with pytest.raises(WeightsError, match="changed while tensor q was read from it"):
        files.read(file, 0, 1000, space_for(1000), "q")
    os.truncate(file, 3 * PAGE)
    with pytest.raises(WeightsError, match="ends inside tensor q: it was cut"):
        files.read(file, 0, SIZE, space_for(SIZE), "q")
    files.close()


def test_a_read_can_be_stopped_between_slices(
    weights: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SLICE", PAGE)
    system = Faults(delay=0.02)
    files = WeightFiles(system)
    began = time.monotonic()
    with pytest.raises(ReadStopped):
        files.read(weights[0], 0, SIZE, space_for(SIZE), "q", lambda: time.monotonic() - began > 0.05)
    assert time.monotonic() - began < 2 and system.reads < 12
    files.close()


def test_streaming_stays_out_of_the_page_cache(weights: tuple[Path, bytes], tmp_path: Path) -> None:
    file = copy_of(weights, tmp_path)
    if cached_pages(file):
        pytest.skip("this filesystem keeps its pages: a RAM disk")
    files = WeightFiles()
    if files.uses_page_cache(file):
        pytest.skip("no O_DIRECT on this filesystem")
    for begin in range(0, SIZE - 10_000, 10_000):
        files.read(file, begin, 10_000, space_for(10_000), "q")
    left = cached_pages(file)
    counts = files.counts
    print(f"{left} of {SIZE // PAGE} pages are cached after reading all; {counts}")
    assert left <= 2
    assert counts.disk_bytes > 0.9 * SIZE and counts.cached_bytes < 0.1 * SIZE
    files.close()


def test_buffered_reads_are_dropped_behind(weights: tuple[Path, bytes], tmp_path: Path) -> None:
    file = copy_of(weights, tmp_path)
    if cached_pages(file):
        pytest.skip("this filesystem keeps its pages: a RAM disk")
    files = WeightFiles(Faults(direct=False, cached=True))
    for begin in range(0, 40 * PAGE, 8 * PAGE):
        files.read(file, begin, 8 * PAGE, space_for(8 * PAGE), "q")
    left = cached_pages(file)
    print(f"{left} of {SIZE // PAGE} pages are cached after reading all through the cache")
    assert left <= 2
    files.close()


def test_what_is_cached_is_taken_and_kept(weights: tuple[Path, bytes], tmp_path: Path) -> None:
    file = copy_of(weights, tmp_path)
    file.read_bytes()
    before = cached_pages(file)
    files = WeightFiles()
    assert bytes(files.read(file, 3, SIZE - 3, space_for(SIZE), "q")) == weights[1][3:]
    if files.counts.cached_bytes == 0:
        pytest.skip("this filesystem does not tell what is cached")
    assert files.counts.cached_bytes == SIZE - 3 and files.counts.disk_bytes == 0
    assert cached_pages(file) == before
    files.close()


def test_speed_counts_time_once_for_reads_side_by_side(weights: tuple[Path, bytes]) -> None:
    files = WeightFiles(Faults(delay=0.3))
    assert files.counts.disk_speed is None
    threads = [
        threading.Thread(target=files.read, args=(weights[0], n * PAGE, PAGE, space_for(PAGE), "q"))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = files.counts
    assert counts.disk_bytes == 4 * PAGE
    assert 0.29 < counts.disk_seconds < 1.0, "four sleeps of 0.3 s at once are not 1.2 s"
    assert counts.disk_speed == pytest.approx(4 * PAGE / counts.disk_seconds)
    files.close()


def test_every_descriptor_is_given_back(weights: tuple[Path, bytes]) -> None:
    system = Faults()
    files = WeightFiles(system)
    for _ in range(3):
        files.read(weights[0], 0, 10, space_for(10), "q")
    assert system.open_files == 2  # buffered and direct, once each
    files.close()
    files.close()
    assert system.open_files == 0
    with pytest.raises(RuntimeError, match="after its weights were closed"):
        files.read(weights[0], 0, 10, space_for(10), "q")
    dropped = WeightFiles(system)
    dropped.open(weights[0])
    del dropped
    assert system.open_files == 0
