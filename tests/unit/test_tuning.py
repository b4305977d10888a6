"""What is remembered of a GPU: the file and all that can be wrong with it, and what is chosen by it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import tuning, tuning_file
from runtime.errors import RequestError
from runtime.kernels import configs, launch
from runtime.kernels.tune import Timing
from runtime.layers import backends
from runtime.layers.backends import BACKENDS, Proof
from runtime.linear import module
from runtime.linear.fp8 import Fp8Linear
from runtime.tuning import Store, apply_tiles, choose_attention
from runtime.tuning_file import Attention, Avoided, Content, Entry, Product, Setting, Tiles, setting_of
from tests.unit.test_device import RTX4090, install_driver

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 3)
SETTING = Setting(
    gpu="NVIDIA RTX 4090",
    capability="8.9",
    driver="580.65",
    cuda="12.8",
    packages={"torch": "2.8.0", "triton": "3.4.0", "fourstep": "0.1.0"},
)
SIZE: dict[str, Any] = {"tokens": 30720, "keys": 30720, "heads": 40, "head_dim": 128, "dtype": "bfloat16"}
FOUND = Attention(
    **SIZE,
    date="2026-11-22",
    won="sage2",
    entries=(
        Entry(name="sage2", ok=True, distance=0.03, ms=3.0),
        Entry(name="sdpa", ok=True, distance=0.002, ms=9.5),
        Entry(name="sdpa-math", ok=True, distance=0.0018),
        Entry(name="sage1", ok=False, reason="not installed, or not for this GPU"),
    ),
)
TILES = Tiles(rows=128, columns=256, depth=64, group=8, warps=8, stages=3, descriptors=False, programs=1)
PRODUCT = Product(
    dtype="fp8",
    columns=5120,
    depth=5120,
    rows=4096,
    date="2026-11-22",
    way="fused",
    tiles=TILES,
    ms={"fused": 1.0, "rowwise": 1.3},
)


def full(directory: Path, setting: Setting = SETTING) -> Store:
    """A store that knows something of everything, in a file."""
    store = Store(directory, setting)
    store.keep_attention(FOUND)
    store.keep_product(PRODUCT)
    store.avoid("sage1", "NaN after\nstep 2")
    return store


def path_of(directory: Path, setting: Setting = SETTING) -> Path:
    path = Store(directory, setting).path
    assert path is not None
    return path


# -------------------------------------------------------------------------------------------------- the file


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    full(tmp_path)
    again = Store(tmp_path, SETTING)
    assert again.attention(**SIZE) == FOUND
    assert again.content.products == (PRODUCT,)
    assert again.avoided() == {"sage1"} and again.content.avoided[0].reason == "NaN after step 2"
    assert again.take_notes() == ()
    said = json.loads(path_of(tmp_path).read_text())
    assert (said["format"], said["schema"]) == ("t2v-tuning", 1)
    assert said["of"]["gpu"] == "NVIDIA RTX 4090" and said["of"]["packages"]["torch"] == "2.8.0"
    assert {path.name for path in path_of(tmp_path).parent.iterdir()} == {
        f"{SETTING.key}{ending}" for ending in (".json", ".lock")
    }
    again.forgive()
    assert Store(tmp_path, SETTING).avoided() == set()


def test_the_same_size_is_replaced_and_the_oldest_go(tmp_path: Path) -> None:
    store = full(tmp_path)
    store.keep_product(PRODUCT.model_copy(update={"way": "rowwise"}))
    store.keep_attention(FOUND.model_copy(update={"entries": FOUND.entries[:1]}))
    store.avoid("sage1", "again")
    now = Store(tmp_path, SETTING).content
    assert [one.way for one in now.products] == ["rowwise"]
    assert [len(one.entries) for one in now.attention] == [1]
    assert [one.reason for one in now.avoided] == ["again"]
    plenty = [FOUND.model_copy(update={"tokens": tokens}) for tokens in range(1, 2 * tuning.MOST)]
    memory = Store(None)
    for one in plenty:
        memory.keep_attention(one)
    assert len(memory.content.attention) == tuning.MOST and memory.content.attention[-1] == plenty[-1]
    Content.model_validate_json(memory.content.model_dump_json(by_alias=True))


def test_nothing_is_written_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "write", lambda *_: pytest.fail("wrote"))
    store = full(None)  # type: ignore[arg-type]
    assert store.avoided() == {"sage1"} and store.attention(**SIZE) == FOUND
    assert store.path is None and not list(tmp_path.iterdir())


def test_any_text_can_be_a_reason(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    store.avoid("x" * 500, "\ud800 " + "word " * 5000)
    store.avoid("", "")
    again = Store(tmp_path, SETTING)
    assert again.avoided() == {"x" * 100, ""} and again.take_notes() == ()


FAULTS: dict[str, tuple[Any, str]] = {
    "empty": (b"", "cut off or no JSON"),
    "cut": (lambda whole: whole[: len(whole) // 2], "cut off or no JSON"),
    "no text": (b"\xff\xfe\x00", "cut off or no JSON"),
    "a list": (b"[]", "not as expected"),
    "another format": (lambda whole: whole.replace(b"t2v-tuning", b"t2v-testing"), "entry format"),
    "another schema": (lambda whole: whole.replace(b'"schema": 1', b'"schema": 2'), "entry schema"),
    "a strange key": (lambda whole: whole.replace(b'"of"', b'"more": 1, "of"'), "entry more"),
    "a wrong type": (lambda whole: whole.replace(b'"tokens": 30720', b'"tokens": "30720"'), "tokens"),
    "no number": (lambda whole: whole.replace(b'"ms": 3.0', b'"ms": NaN'), "ms"),
    "below zero": (lambda whole: whole.replace(b'"ms": 3.0', b'"ms": -3.0'), "ms"),
    "deep": (b"[" * 100_000, "no JSON"),
    "large": (lambda whole: whole + b" " * tuning_file.LARGEST, "larger than 1 MiB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_good_costs_one_word(fault: str, tmp_path: Path) -> None:
    full(tmp_path)
    change, says = FAULTS[fault]
    path = path_of(tmp_path)
    path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    store = Store(tmp_path, SETTING)
    assert store.avoided() == set() and store.attention(**SIZE) is None
    (note,) = store.take_notes()
    assert says in note and str(path) in note and "\n" not in note
    store.avoid("sage2", "wrong")  # and what is learned next makes it good
    store.avoid("sage1", "wrong")
    assert store.take_notes() == ()
    assert Store(tmp_path, SETTING).avoided() == {"sage1", "sage2"}


def test_something_else_in_its_place(tmp_path: Path) -> None:
    path = path_of(tmp_path)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
        store = Store(tmp_path, SETTING)
        assert store.avoided() == set()
        assert len(store.take_notes()) == 1
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_of_others_under_its_name(tmp_path: Path) -> None:
    full(tmp_path)
    text = path_of(tmp_path).read_text().replace("580.65", "550.54")
    path_of(tmp_path).write_text(text)
    store = Store(tmp_path, SETTING)
    assert store.avoided() == set()
    assert "another GPU or other versions" in store.take_notes()[0]


def test_older_versions_are_the_reason_why_it_is_measured_again(tmp_path: Path) -> None:
    full(tmp_path)
    full(tmp_path, SETTING.model_copy(update={"gpu": "another"}))
    newer = SETTING.model_copy(
        update={"driver": "590.1", "packages": {**SETTING.packages, "sageattention": "2.2.0"}}
    )
    store = Store(tmp_path, newer)
    assert store.avoided() == set()
    (note,) = store.take_notes()
    assert "driver 580.65 -> 590.1, sageattention none -> 2.2.0" in note
    store.avoid("sage2", "wrong")
    assert Store(tmp_path, newer).avoided() == {"sage2"} and Store(tmp_path, SETTING).avoided() == {"sage1"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tuning, "write", refuse)
    store = Store(tmp_path, SETTING)
    store.avoid("sage2", "wrong")
    store.avoid("sage2-fp32", "wrong")
    assert store.avoided() == {"sage1", "sage2", "sage2-fp32"}, "this process remembers"
    (note,) = store.take_notes()
    assert os.strerror(code) in note and "--cache" in note
    assert Store(tmp_path, SETTING).avoided() == {"sage1"}


def test_a_cache_that_is_a_file_and_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file", SETTING)
    store.avoid("sage2", "wrong")
    assert store.avoided() == {"sage2"} and len(store.take_notes()) == 2
    full(tmp_path)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tuning_file.os, "open", refuse)
    store = Store(tmp_path, SETTING)
    assert store.avoided() == set() and "Permission denied" in store.take_notes()[0]


WHOLE = Content(of=SETTING, attention=(FOUND,), products=(PRODUCT,), avoided=()).model_dump_json(
    by_alias=True
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def almost_whole(draw: st.DrawFn) -> bytes:
    """The file with an entry replaced by anything, or with bytes changed."""
    if draw(st.booleans()):
        said = json.loads(WHOLE)
        place: Any = said
        for _ in range(draw(st.integers(0, 4))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(sorted(keys))) if len(keys) else None
            if key is None or not isinstance(place[key], (dict, list)) or not place[key]:
                break
            place = place[key]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        place[draw(st.sampled_from(keys))] = draw(JSON)
        return json.dumps(said).encode()
    text = bytearray(WHOLE.encode())
    start = draw(st.integers(0, len(text)))
    text[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(text)


@settings(max_examples=150)
@given(text=st.binary(max_size=200) | JSON.map(lambda one: json.dumps(one).encode()) | almost_whole())
def test_no_bytes_in_the_file_are_an_error(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-bytes"
    path = path_of(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    store = Store(directory, SETTING)
    before = store.avoided()
    known = store.attention(**SIZE)
    assert known is None or tuning.fastest_first(known.entries)
    assert len(store.take_notes()) <= 1
    store.avoid("sage2", "wrong")
    assert Store(directory, SETTING).avoided() == before | {"sage2"}


def test_the_key_is_another_when_any_version_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_file, "torch_cuda", lambda: (12, 8))
    versions = dict.fromkeys(tuning_file.PACKAGES, "1.0")

    def installed(name: str) -> str:
        if name not in versions:
            raise tuning_file.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(tuning_file, "version", installed)
    keys = [setting_of(RTX4090).key]
    for name in tuning_file.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setitem(versions, name, "1.1")
            keys.append(setting_of(RTX4090).key)
        with monkeypatch.context() as patch:
            patch.delitem(versions, name)
            keys.append(setting_of(RTX4090).key)
    for other in (
        replace(RTX4090, name="NVIDIA GeForce RTX 4090 D"),
        replace(RTX4090, capability=(9, 0)),
        replace(RTX4090, driver="590.1"),
    ):
        keys.append(setting_of(other).key)
    monkeypatch.setattr(tuning_file, "torch_cuda", lambda: (13, 0))
    keys.append(setting_of(RTX4090).key)
    assert len(set(keys)) == len(keys)
    same = replace(RTX4090, index=1, uuid="GPU-other", free=1, total=2)
    assert setting_of(same).key == keys[-1], "another card of the kind, or what is free, is no other setting"


def test_a_store_is_for_the_gpu_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.open_store(tmp_path, "cpu").path is None
    install_driver(monkeypatch, RTX4090)
    path = tuning.open_store(tmp_path, "cuda:0").path
    assert path == tmp_path / "tuning" / f"{setting_of(RTX4090).key}.json"
    assert tuning.open_store(None, "cuda:0").path is None
    assert tuning.open_store(tmp_path, "cuda:7").path is None


WRITER = """
import sys
from pathlib import Path
from runtime.tuning import Store
from runtime.tuning_file import Setting
store = Store(Path(sys.argv[1]), Setting.model_validate_json(sys.argv[2]))
sys.stdin.read(1)
for number in range(12):
    store.avoid(f"{sys.argv[3]}-{number}", "wrong")
print(*store.notes)
"""


def test_processes_side_by_side_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), SETTING.model_dump_json()]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "abc"]
    for writer in writers:
        writer.stdin.write("x")
        writer.stdin.flush()
    notes = [writer.communicate(timeout=60)[0].strip() for writer in writers]
    assert notes == ["", "", ""]
    assert Store(tmp_path, SETTING).avoided() == {f"{name}-{n}" for name in "abc" for n in range(12)}
    assert not list(path_of(tmp_path).parent.glob("*.partial"))


# --------------------------------------------------------------------------------------------- what is chosen


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU with made-up backends; says what was proven and timed. Take from `times` to uninstall one."""
    here: dict[str, Any] = {
        "times": {"sage2": 3.0, "sage2-fp16": 5.0, "sdpa-cudnn": 8.0, "sdpa": 9.5, "sdpa-math": 900.0},
        "wrong": set(),
        "proven": [],
        "timed": [],
    }

    def prove(name: str, *_: object) -> Proof:
        here["proven"].append(name)
        ok = name in here["times"] and name not in here["wrong"]
        return Proof(name, ok, 0.01, "" if ok else "is wrong here")

    def timed(runs: dict[str, object], repeats: int, clock: object) -> list[Timing]:
        here["timed"].append(sorted(runs))
        return sorted(
            (Timing(name, here["times"][name]) for name in runs), key=lambda one: one.milliseconds or 0
        )

    functions = (backends.proofs, backends._fastest, backends.available)
    for function in functions:
        function.cache_clear()
    monkeypatch.setattr(
        backends, "available", lambda name, _: backends.math if name in here["times"] else None
    )
    monkeypatch.setattr(backends, "prove", prove)
    monkeypatch.setattr(backends, "inputs", lambda *_: (None, None, None))
    monkeypatch.setattr(backends, "processors_of", lambda _: 132)
    monkeypatch.setattr(backends, "time_candidates", timed)
    yield here
    for function in functions:
        function.cache_clear()


def another_process() -> None:
    backends.proofs.cache_clear()
    backends._fastest.cache_clear()


def test_what_is_known_is_only_proven_again(card: dict[str, Any], tmp_path: Path) -> None:
    first = choose_attention(Store(tmp_path, SETTING), GPU, 32760)
    assert first.name == "sage2" and sorted(card["proven"]) == sorted(BACKENDS) and len(card["timed"]) == 1
    another_process()
    card["proven"].clear()
    store = Store(tmp_path, SETTING)
    again = choose_attention(store, GPU, 32760)
    assert again.name == "sage2" and card["proven"] == ["sage2"] and len(card["timed"]) == 1
    assert store.take_notes() == ()
    assert (
        backends.rungs(again, GPU)
        == backends.rungs(first, GPU)
        == ["sage2", "sage2-fp16", "sdpa-cudnn", "sdpa-math"]
    )
    assert choose_attention(store, GPU, 75600).name == "sage2" and len(card["timed"]) == 1, "timed at 30,720"
    choose_attention(store, GPU, 3000)
    choose_attention(store, GPU, 32760, heads=12)
    choose_attention(store, GPU, 32760, dtype=torch.float16)
    assert len(card["timed"]) == 4, "another size is not known"


def test_the_length_that_was_measured_itself_counts_most(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    store.keep_attention(FOUND)
    other = [Entry(name=name, ok=True, ms=ms) for name, ms in (("sage2-fp16", 20.0), ("sage2", 30.0))]
    store.keep_attention(FOUND.model_copy(update={"tokens": 32760, "keys": 32760, "entries": tuple(other)}))
    assert choose_attention(store, GPU, 32760).name == "sage2-fp16"
    assert choose_attention(store, GPU, 30720).name == "sage2"
    assert choose_attention(store, GPU, 31000).name == "sage2"
    assert choose_attention(store, GPU, 75600).name == "sage2-fp16" and not card["timed"]


def test_what_failed_before_is_left_out(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    assert choose_attention(store, GPU, 32760).name == "sage2"
    store.avoid("sage2", "NaN at step 2")
    another_process()
    store = Store(tmp_path, SETTING)
    choice = choose_attention(store, GPU, 32760)
    assert choice.name == "sage2-fp16" and len(card["timed"]) == 1, "the others were timed already"
    assert backends.rungs(choice, GPU) == ["sage2-fp16", "sdpa-cudnn", "sdpa-math"]
    refused = {proof.name: proof.reason for proof in choice.proofs if not proof.ok}
    assert "wrong numbers" in refused["sage2"]
    new = choose_attention(store, GPU, 3000)  # a size that nobody knows
    assert new.name == "sage2-fp16" and "sage2" not in card["timed"][-1]
    assert choose_attention(store, GPU, 32760, forced="sage2").name == "sage2", "who names it gets it"
    for name in ("sage2-fp16", "sdpa-cudnn", "sdpa", "sdpa-math"):
        store.avoid(name, "garbage")
    assert choose_attention(store, GPU, 32760).name == "sdpa-math", "the last resort is never left out"
    store.forgive()
    assert choose_attention(store, GPU, 32760).name == "sage2"


def test_what_is_wrong_by_now_is_measured_again(card: dict[str, Any], tmp_path: Path) -> None:
    choose_attention(Store(tmp_path, SETTING), GPU, 32760)
    another_process()
    card["wrong"].add("sage2")
    store = Store(tmp_path, SETTING)
    assert choose_attention(store, GPU, 32760).name == "sage2-fp16"
    assert "sage2 was right on this GPU and is not any more (is wrong here)" in store.take_notes()[0]
    another_process()
    card["proven"].clear()
    assert choose_attention(Store(tmp_path, SETTING), GPU, 32760).name == "sage2-fp16"
    assert card["proven"] == ["sage2-fp16"], "and it is remembered"


def test_few_keys_take_sixteen_bits(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    choice = choose_attention(store, GPU, 32760, 512)
    assert choice.name == "sdpa-cudnn" and card["timed"] == [["sdpa", "sdpa-cudnn"]]
    assert backends.rungs(choice, GPU) == ["sdpa-cudnn", "sdpa", "sdpa-math"]
    assert choose_attention(store, GPU, 32760, 2000).name == "sage2", "these are not few"
    assert choose_attention(store, GPU, 512).name == "sage2", "nor are these, for as many queries"
    another_process()
    assert choose_attention(Store(tmp_path, SETTING), GPU, 32760, 512).name == "sdpa-cudnn"
    assert len(card["timed"]) == 3, "and it is remembered"


def test_few_keys_take_sixteen_bits_even_where_eight_were_timed(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    store.keep_attention(FOUND.model_copy(update={"keys": 512}))
    assert choose_attention(store, GPU, 32760, 512).name == "sdpa" and not card["timed"]
    found = {entries[0].name: entries for entries in (FOUND.entries, FOUND.entries[1:], FOUND.entries[2:])}
    assert [tuning.winner(entries, 30720, 30720) for entries in found.values()] == [*found]
    assert [tuning.winner(entries, 30720, 512) for entries in found.values()] == ["sdpa", "sdpa", "sdpa-math"]


def test_what_is_right_but_was_not_timed_is_timed(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    untimed = FOUND.entries[0].model_copy(update={"ms": None})
    store.keep_attention(FOUND.model_copy(update={"entries": (untimed, *FOUND.entries[1:])}))
    assert choose_attention(store, GPU, 32760, 30720).name == "sage2" and len(card["timed"]) == 1
    another_process()
    assert choose_attention(store, GPU, 32760).name == "sage2" and len(card["timed"]) == 1


def test_cross_attention_is_remembered_by_itself(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    assert choose_attention(store, GPU, 32760, 512).name == "sdpa-cudnn"
    assert [(one.tokens, one.keys) for one in store.content.attention] == [(30720, 512)]
    assert choose_attention(store, GPU, 75600, 512).name == "sdpa-cudnn" and len(card["timed"]) == 1
    assert choose_attention(store, GPU, 75600, 226).name == "sdpa-cudnn" and len(card["timed"]) == 2


def test_on_a_cpu_nothing_is_remembered(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    store.avoid("sage2", "wrong")
    assert choose_attention(store, torch.device("cpu"), 100).name == "sdpa"
    assert not store.content.attention and apply_tiles(store, torch.device("cpu")) == 0
    with pytest.raises(RequestError, match="unknown"):
        choose_attention(store, GPU, 100, forced="sage9")


def test_a_strange_backend_in_the_file_is_not_run(card: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    odd = Entry(name="os.system", ok=True, ms=0.1)
    store.keep_attention(FOUND.model_copy(update={"entries": (odd, *FOUND.entries)}))
    assert choose_attention(store, GPU, 32760).name == "sage2" and card["proven"] == ["sage2"]


# ------------------------------------------------------------------------------------------------- products


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What `configs.use` was told, on a card of compute capability 8.9."""
    monkeypatch.setattr(launch, "capability", lambda _: (8, 9))
    monkeypatch.setattr(configs, "_used", {})
    monkeypatch.setattr(module, "_measured", {})
    return configs._used


def test_tiles_and_ways_are_applied(used: dict[Any, Any]) -> None:
    store = Store(None)
    store.keep_product(PRODUCT)
    store.keep_product(PRODUCT.model_copy(update={"dtype": "int8", "depth": 13824, "way": "integer"}))
    assert apply_tiles(store, GPU) == 2
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    config = configs.Config(128, 256, 64, stages=3)
    assert used == {(GPU, fp8, 5120, 5120): config, (GPU, int8, 5120, 13824): config}
    assert module._measured == {(GPU, fp8, 5120, 5120): "fused"}, "int8 has no memory for torch's sums"
    store.keep_product(PRODUCT.model_copy(update={"way": "rowwise"}))
    apply_tiles(store, GPU)
    assert not module._measured, "and back again"


def test_tiles_that_are_none_of_this_gpus_are_not_used(used: dict[Any, Any]) -> None:
    store = Store(None)
    for change in ({"rows": 7}, {"stages": 1000}, {"descriptors": True}):
        store.keep_product(PRODUCT.model_copy(update={"tiles": TILES.model_copy(update=change)}))
        assert apply_tiles(store, GPU) == 0 and not used
    store.keep_product(PRODUCT.model_copy(update={"tiles": None}))
    store.keep_product(PRODUCT.model_copy(update={"dtype": "fp4"}))
    assert apply_tiles(store, GPU) == 0 and not used
    store.keep_product(PRODUCT)
    store.avoid(tuning.FUSED_KERNELS, "garbage")
    assert apply_tiles(store, GPU) == 0 and not used and not module._measured


def test_a_way_is_preferred_only_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.linear import fp8

    monkeypatch.setattr(module, "_measured", {})
    linear = Fp8Linear(64, 32, device="meta")
    rows = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")

    class Fake:
        device, dtype = GPU, torch.bfloat16

    works = {"fused": True, "kernels": True}
    monkeypatch.setattr(fp8, "_device_way", lambda _: "rowwise")
    monkeypatch.setattr(fp8, "_fused_works", lambda _: works["fused"])
    monkeypatch.setattr(fp8, "fused", lambda *_: works["kernels"])
    assert linear.way(rows) == "reference"
    fake: Any = Fake()
    assert linear.way(fake) == "rowwise"
    module.prefer("fused", GPU, torch.float8_e4m3fn, 32, 64)
    assert linear.way(fake) == "fused"
    module.prefer("fused", GPU, torch.float8_e4m3fn, 64, 32)
    for piece in works:
        works[piece] = False
        assert linear.way(fake) == "rowwise", f"without {piece}"
        works[piece] = True
    module.prefer(None, GPU, torch.float8_e4m3fn, 32, 64)
    assert linear.way(fake) == "rowwise"


def test_the_file_knows_the_constants_of_the_engine() -> None:
    assert tuning.LONG == backends.TIMED_TOKENS
    assert set(configs.Config.__dataclass_fields__) == set(Tiles.model_fields)
    assert Avoided.model_fields.keys() == {"name", "reason", "date"}
