"""Weight files: whole ones are read exactly, broken ones are one sentence that names them."""

import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runtime.checkpoint.files import read_header, read_index, read_pickle, read_tensor
from runtime.checkpoint.write import write_json, write_pickle, write_safetensors
from runtime.errors import OutputError, WeightsError
from tests.unit.checkpoint_fixtures import header_of, raw, replace_header


def sample(seed: int) -> dict[str, torch.Tensor]:
    """One tensor of each dtype that checkpoints use; odd sizes, a scalar and an empty one among them."""
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=g).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.rand(5, 1, generator=g),
        "b": torch.randn(3, 2, 4, generator=g).bfloat16(),
        "c": torch.randint(-128, 128, (4, 9), generator=g, dtype=torch.int8),
        "d": torch.randn((), generator=g).half(),
        "e": torch.empty(0, dtype=torch.float8_e5m2),
        "f": torch.randint(0, 9, (2,), generator=g),
    }


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("seed", [1, 2])
def test_safetensors_are_read_as_they_were_written(tmp_path: Path, seed: int) -> None:
    tensors = sample(seed)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert write_safetensors(ours, tensors) == ours.stat().st_size
    save_file(tensors, theirs)
    for path in (ours, theirs):
        infos = read_header(path)
        assert infos.keys() == tensors.keys()
        assert sum(info.nbytes for info in infos.values()) == sum(t.nbytes for t in tensors.values())
        for name, tensor in tensors.items():
            assert same(read_tensor(infos[name]), tensor), name
    assert all(same(tensor, tensors[name]) for name, tensor in raw([ours]).items())  # the library reads ours
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_pth_is_read_by_offset_as_torch_reads_it(tmp_path: Path) -> None:
    tensors = {**sample(3), "t": torch.randn(6, 4).t(), "view": torch.randn(10)[3:7]}
    path = tmp_path / "flat.pth"
    torch.save(tensors, path)
    infos, mapped = read_pickle(path)
    for name, tensor in tensors.items():
        assert same(mapped[name].contiguous(), tensor.contiguous()), name
        if name not in ("t", "e"):  # a transposed view has no one place in the file, an empty tensor none
            assert same(read_tensor(infos[name]), tensor.contiguous()), name
    assert infos["t"].offset is None


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_pth(tmp_path: Path, key: str) -> None:
    tensors = sample(4)
    torch.save({key: tensors, "epoch": 3}, tmp_path / "nested.pth")
    infos, _ = read_pickle(tmp_path / "nested.pth")
    assert infos.keys() == tensors.keys()


def test_written_pickle_holds_no_foreign_storage(tmp_path: Path) -> None:
    big = torch.randn(100_000)
    write_pickle(tmp_path / "x.pth", {"part": big[:4]})
    assert (tmp_path / "x.pth").stat().st_size < 4000
    assert same(torch.load(tmp_path / "x.pth", weights_only=True)["part"], big[:4])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_cut_at_any_byte_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    write = write_safetensors if suffix == ".safetensors" else write_pickle
    write(path, sample(5))
    whole = path.read_bytes()
    rng = random.Random(5)
    for cut in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(25))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=f"model{suffix}"):
            read_header(path) if suffix == ".safetensors" else read_pickle(path)


def test_a_file_with_foreign_bytes_behind_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    write_safetensors(path, sample(6))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(WeightsError, match=r"long\.safetensors.*foreign bytes"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.safetensors"
    write_safetensors(path, sample(7))
    info = read_header(path)["c"]
    path.write_bytes(path.read_bytes()[: (info.offset or 0) + 5])
    with pytest.raises(WeightsError, match=r"shrinks\.safetensors ends inside tensor c"):
        read_tensor(info)


BROKEN_ENTRIES = {
    "dtype of ours unknown": {"dtype": "F4", "shape": [5, 7], "data_offsets": [0, 35]},
    "negative size": {"dtype": "I8", "shape": [-5, -7], "data_offsets": [0, 35]},
    "a float as size": {"dtype": "I8", "shape": [5.0, 7], "data_offsets": [0, 35]},
    "true as size": {"dtype": "I8", "shape": [True, 35], "data_offsets": [0, 35]},
    "bytes and shape differ": {"dtype": "I8", "shape": [5, 8], "data_offsets": [0, 35]},
    "offsets backwards": {"dtype": "I8", "shape": [5, 7], "data_offsets": [35, 0]},
    "a hole": {"dtype": "I8", "shape": [5, 7], "data_offsets": [1, 36]},
    "a huge empty shape": {"dtype": "I8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
    "no offsets": {"dtype": "I8", "shape": [5, 7]},
    "not an object": 5,
}


@pytest.mark.parametrize("entry", BROKEN_ENTRIES.values(), ids=BROKEN_ENTRIES.keys())
def test_a_wrong_header_entry_names_its_tensor(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "wrong.safetensors"
    write_safetensors(path, {"first.one": torch.ones(5, 7, dtype=torch.int8)})
    replace_header(path, {**header_of(path), "first.one": entry})
    with pytest.raises(WeightsError, match=r"wrong\.safetensors.*first\.one"):
        read_header(path)


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    """Their bytes add up to the file's size, because there is a hole as well."""
    path = tmp_path / "overlap.safetensors"
    write_safetensors(path, {"all": torch.ones(30, dtype=torch.int8)})
    entry = {"dtype": "I8", "shape": [10]}
    spans = {"one": [0, 10], "two": [0, 10], "three": [20, 30]}
    replace_header(path, {name: {**entry, "data_offsets": span} for name, span in spans.items()})
    with pytest.raises(WeightsError, match=r"overlap\.safetensors: tensor two begins at byte"):
        read_header(path)


def test_a_name_that_occurs_twice_is_told(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"xy")
    with pytest.raises(WeightsError, match=r"twice\.safetensors.*a name occurs twice"):
        read_header(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a":' + b"9" * 5000 + b"}"],
)
def test_a_header_that_is_no_object_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "json.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(WeightsError, match=r"json\.safetensors"):
        read_header(path)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_corrupt_byte_is_an_error_or_leaves_the_other_tensors_alone(
    tmp_path: Path, data: st.DataObject
) -> None:
    """No exception but WeightsError, and no tensor but the one that the byte lies in is read differently."""
    path = tmp_path / "model.safetensors"
    tensors = sample(8)
    write_safetensors(path, tensors)
    whole = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    place = data.draw(st.one_of(st.integers(0, start - 1), st.integers(0, len(whole) - 1)))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        read = {name: read_tensor(info) for name, info in read_header(path).items()}
    except WeightsError as error:
        assert "model.safetensors" in str(error)
        assert place < start  # a byte of the data is not the header's to notice
        return
    assert len(read) in (len(tensors), len(tensors) + 1)  # one more when the name __metadata__ was hit
    different = [name for name, tensor in tensors.items() if name not in read or not same(read[name], tensor)]
    assert len(different) <= 1


class Bomb:
    """Runs a command when a careless loader unpickles it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "it_ran"
    content = {"a.weight": torch.ones(2), "b": Bomb(trace)}
    if how == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        read_pickle(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes())
    assert trace.exists()  # a careless loader would have run it


def test_pth_of_other_things_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    for content, said in (
        ([torch.ones(2)], "dict of named tensors"),
        ({3: torch.ones(2)}, "dict of named tensors"),
        ({"a": torch.ones(2), "lr": 0.1}, "'lr' is a float"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=rf"odd\.pth.*{said}"):
            read_pickle(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"odd\.pth.*non-zip"):
        read_pickle(path)
    with pytest.raises(WeightsError, match=r"absent\.pth cannot be read"):
        read_pickle(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("[]", "weight_map"), ('{"weight_map": {}}', "weight_map"), ("", "not JSON")]
    + [
        (f'{{"weight_map": {{"a": {name}}}}}', "beside the index")
        for name in ('"../x"', '"/etc/x"', "3", '"."')
    ],
)
def test_an_index_is_checked(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=rf"m\.safetensors\.index\.json.*{said}"):
        read_index(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    plan = {"a": torch.empty(3, device="meta"), "b": torch.empty(2, device="meta")}
    with pytest.raises(ValueError, match="fewer tensors"):
        write_safetensors(path, plan, iter([("a", torch.rand(3))]))
    with pytest.raises(ValueError, match="differs from the plan"):
        write_safetensors(path, plan, iter([("a", torch.rand(4))]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(tmp_path / "file" / "below.json", {})
