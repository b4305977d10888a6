"""Weight files that are broken, or made to break: one kind of error, memory of their size, no code run."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from runtime.checkpoint import open_checkpoint
from runtime.checkpoint.convert import INDEX_FILE
from runtime.checkpoint.files import read_header, read_index, read_pickle, read_tensor
from runtime.errors import WeightsError
from tests.unit.checkpoint_fixtures import tensors_of

FEW = settings(max_examples=80)
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
SPARE = 4 << 20  # bytes of Python objects that any reading may take; beyond it, what the file warrants


@cache
def whole() -> bytes:
    """A transformer's .safetensors file."""
    return save({name: tensor.bfloat16() for name, tensor in tensors_of("transformer", 5).items()})


@cache
def pickled() -> bytes:
    """A small .pth file."""
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.randn(4, 4), "b.weight": torch.randn(3)}, buffer)
    return buffer.getvalue()


def header_bytes(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextmanager
def bounded(path: Path) -> Iterator[None]:
    """Python's own memory stays near the file's size; tensors are checked by their shapes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SPARE + 40 * path.stat().st_size


def opened(path: Path, kind: Any) -> None:
    """Open and read everything; WeightsError is the one thing that may be raised."""
    try:
        checkpoint = open_checkpoint(path, kind)
        checkpoint.sizes()
        assert checkpoint.nbytes <= path.stat().st_size
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except WeightsError as error:
        assert "\n" not in str(error) and len(str(error)) < 2500


# ---------------------------------------------------------------------------------------------- safetensors

flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=6)


@FEW
@given(flips=flips, cut=st.none() | st.floats(0, 1))
def test_flipped_bits_and_cuts(place: Path, flips: list[tuple[float, int]], cut: float | None) -> None:
    data = bytearray(whole())
    for where, bit in flips:  # in the header: any other byte is as good a number as the one before it
        data[int(where * header_bytes(whole()))] ^= 1 << bit
    path = place / "flipped.safetensors"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    opened(path, "transformer")


@FEW
@given(data=st.binary(max_size=400))
def test_any_bytes(place: Path, data: bytes) -> None:
    for name in ("any.safetensors", "any.pth"):
        path = place / name
        path.write_bytes(data)
        opened(path, "vae")


numbers = st.integers(-2, 2**70) | st.sampled_from([0, 1, 4, 8, 2**31, 2**40, 2**63])
loose = st.none() | st.booleans() | st.floats() | st.text(max_size=4) | numbers
jsons = st.recursive(loose, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "C64", "", None, 3]),
        "shape": st.lists(numbers, max_size=10) | jsons,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | jsons,
    }
)
names = st.sampled_from(["a", "patch_embedding.weight", "blocks.0.norm3.weight", "__metadata__", "\ud800"])


@FEW
@given(header=st.dictionaries(names | st.text(max_size=5), entries | jsons, max_size=5), data=st.binary())
def test_headers_that_lie(place: Path, header: dict[str, object], data: bytes) -> None:
    path = place / "lie.safetensors"
    path.write_bytes(safetensors(header, data))
    try:
        tensors = read_header(path)
    except WeightsError:
        return
    for info in tensors.values():
        assert info.offset is not None and info.offset + info.nbytes <= path.stat().st_size
        assert read_tensor(info).nbytes == info.nbytes <= len(data)


DIGITS = b"9" * 4000
HEADERS = {
    "length": b"\xff" * 8 + b"{}",
    "length of a hundred megabytes": struct.pack("<Q", 100 << 20) + b"{}",
    "shape": safetensors({"a": entry([2**62, 2**62], [0, 4])}, b"data"),
    "no elements of many": safetensors({"a": entry([0, 2**62], [0, 0])}),
    "digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + DIGITS * 2 + b'],"data_offsets":[0,4]}}'),
    "dimensions": safetensors({"a": entry([2**40] * 50_000, [0, 4])}, b"data"),
    "overlap": safetensors({"a": entry([1], [0, 4]), "b": entry([1], [2, 6])}, b"sixsix"),
    "overlap whole": safetensors({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"data"),
    "hole": safetensors({"a": entry([1], [4, 8])}, b"datadata"),
    "before the data": safetensors({"a": entry([1], [-4, 0])}, b""),
    "nested": safetensors(b"[" * 100_000),
    "nested objects": safetensors(b'{"a":' * 100_000),
    "name": safetensors({"a" * 1_000_000: entry([1], [0, 4])}, b"data"),
    "dtype": safetensors({"a": entry([1], [0, 4], "X" * 1_000_000)}, b"data"),
    "twice": safetensors(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"data"),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_were_made_to_break(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "made.safetensors"
    path.write_bytes(data)
    with bounded(path), pytest.raises(WeightsError) as raised:
        read_header(path)
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize("number", [999_999_999, 10**300])
def test_a_block_of_any_number(tmp_path: Path, number: int) -> None:
    """A list of the blocks before it would take all memory there is."""
    header = {
        f"blocks.{number}.ffn.0.weight": entry([1], [0, 4]),
        "patch_embedding.weight": entry([1], [4, 8]),
    }
    path = tmp_path / "block.safetensors"
    path.write_bytes(safetensors(header, b"datadata"))
    with bounded(path), pytest.raises(WeightsError, match="no tensor of block 0"):
        open_checkpoint(path, "transformer").sizes()
    few = tmp_path / f"block_{str(number)[:200]}.safetensors"
    path.rename(few)
    with bounded(few), pytest.raises(WeightsError, match=r"block_0\.safetensors is missing"):
        open_checkpoint(tmp_path, "transformer")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # a reader of it waits for a writer
    (tmp_path / "zeros.safetensors").symlink_to("/dev/zero")
    (tmp_path / "itself.safetensors").symlink_to(tmp_path / "itself.safetensors")
    (tmp_path / "directory.safetensors").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError):
            read_header(path)


OUTSIDE = ["/etc/passwd", "../../etc/passwd", "..", ".", "", "a/b.safetensors", "./a.safetensors", "\x00"]
OUTSIDE += ["passwd", "x" * 300 + ".safetensors", "é" * 200 + ".safetensors", "..\\a.safetensors/", "~/a"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "a" / "model"
    inside.mkdir(parents=True)
    (tmp_path / "secret.safetensors").write_bytes(whole())
    index = inside / INDEX_FILE
    for listed in (name, "../../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"patch_embedding.weight": listed}}))
        with pytest.raises(WeightsError, match="beside the index"):
            read_index(index)
        with pytest.raises(WeightsError, match="beside the index"):
            open_checkpoint(inside, "transformer")


@FEW
@given(content=jsons | st.fixed_dictionaries({"weight_map": jsons | st.dictionaries(st.text(), st.text())}))
def test_any_index(place: Path, content: object) -> None:
    index = place / INDEX_FILE
    index.write_text(json.dumps(content))
    try:
        listed = read_index(index)
    except WeightsError:
        return
    finally:
        index.unlink()
    assert all((place / name).parent == place and name.endswith(".safetensors") for name in listed.values())


# ------------------------------------------------------------------------------------------------------ .pth


def repacked(
    pickle_: bytes | None = None, data: bytes | None = None, compress: int = zipfile.ZIP_STORED
) -> bytes:
    """`pickled()` with another pickle, other data, or compressed."""
    source, target = zipfile.ZipFile(io.BytesIO(pickled())), io.BytesIO()
    with zipfile.ZipFile(target, "w", compress) as archive:
        for one in source.infolist():
            content = source.read(one)
            if pickle_ is not None and one.filename.endswith("data.pkl"):
                content = pickle_
            if data is not None and "/data/" in one.filename:
                content = data
            archive.writestr(one.filename, content)
    return target.getvalue()


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def tensor_of(count: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """The pickle of one tensor over record `key`, which it says has `count` numbers."""

    def part(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = part("storage") + b"ctorch\nFloatStorage\n" + part(key) + part("cpu") + part(count)
    arguments = b"((" + storage + b"tQ" + part(0) + part(shape) + part(stride)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_plain_tensor_is_read(tmp_path: Path) -> None:
    """What the tests below change by one thing each."""
    path = written(tmp_path / "a.pth", repacked(tensor_of(16, (4, 4), (4, 1))))
    infos, tensors = read_pickle(path)
    assert torch.equal(read_tensor(infos["a"]), tensors["a"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    calls = [
        Call(os.system, f"touch {mark}"),
        Call(exec, f"open({str(mark)!r}, 'w')"),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(open, str(mark), "w"),
        Call(torch.save, {}, str(mark)),
        Call(mark.touch),
    ]
    for call in calls:
        hidden = {"a": torch.zeros(1).tolist(), "state_dict": {"b": call}}
        for content in (call, {"a": call}, hidden, [call]):
            path = written(tmp_path / "a.pth", repacked(pickle.dumps(content, protocol=protocol)))
            with pytest.raises(WeightsError, match=r"asks for|cannot be read as tensors"):
                read_pickle(path)
    assert not mark.exists()


PICKLES = {
    "numbers than stored": tensor_of(2**40, (4,), (1,)),
    "one number more": tensor_of(17, (17,), (1,)),
    "one number fewer": tensor_of(15, (15,), (1,)),
    "a shape beyond the storage": tensor_of(16, (2**40,), (1,)),
    "rows that are one row": tensor_of(16, (2**31, 2**20), (0, 0)),
    "rows that are one row, fewer": tensor_of(16, (2**20,), (0,)),
    "a negative shape": tensor_of(16, (-4,), (1,)),
    "a negative stride": tensor_of(16, (4,), (-1,)),
    "a negative count": tensor_of(-16, (4,), (1,)),
    "dimensions": tensor_of(16, (1,) * 200, (1,) * 200),
    "a path for a record": tensor_of(16, (4,), (1,), key="../../../../etc/passwd"),
    "an absent record": tensor_of(16, (4,), (1,), key="99"),
    "a string that ends early": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "a long string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02000.",
    "no data at all": pickle.dumps(
        {"a": Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**6,), (1,), False)},
        protocol=2,
    ),
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
def test_pickles_that_were_made_to_break(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "a.pth", repacked(content))
    with bounded(path), pytest.raises(WeightsError) as raised:
        read_pickle(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_compressed_records(tmp_path: Path) -> None:
    """torch maps them as they are: noise for weights. And 300 kB of them may stand for 300 MB."""
    for data in (None, bytes(64 << 20)):
        path = written(tmp_path / "a.pth", repacked(data=data, compress=zipfile.ZIP_DEFLATED))
        with bounded(path), pytest.raises(WeightsError, match="is compressed"):
            read_pickle(path)


@pytest.mark.parametrize("size", [0, 63, 65, 1 << 20, 2**31, 2**32 - 2])
def test_a_table_of_contents_that_lies(tmp_path: Path, size: int) -> None:
    data, at = bytearray(pickled()), 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        name_length = struct.unpack("<H", data[at + 28 : at + 30])[0]
        if data[at + 46 : at + 46 + name_length].endswith(b"/data/0"):
            data[at + 20 : at + 28] = struct.pack("<II", size, size)
        at += 4
    path = written(tmp_path / "a.pth", bytes(data))
    with bounded(path), pytest.raises(WeightsError):
        read_pickle(path)


@settings(max_examples=80)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.floats(0, 1),
)
def test_scribbled_pickles(place: Path, changes: list[tuple[float, int]], cut: float | None) -> None:
    data = bytearray(pickled())
    for where, value in changes:
        data[int(where * len(data))] = value
    path = written(place / "scribbled.pth", bytes(data if cut is None else data[: int(cut * len(data))]))
    try:
        infos, tensors = read_pickle(path)
    except WeightsError:
        return
    for name, info in infos.items():
        assert info.nbytes <= len(data)
        tensors[name].double().sum()  # every byte of it can be touched
