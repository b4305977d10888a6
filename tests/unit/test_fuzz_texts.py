"""Profiles, manifests, tokenizers, latents, records from anyone: one kind of error, soon, in small memory."""

import base64
import copy
import json
import struct
import time
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from entrypoint.latents import read_latents
from runtime.errors import RequestError, WeightsError
from runtime.profiles import MAX_YAML_BYTES, load_profile, parse
from runtime.schema import ModelManifest, Profile
from runtime.tokenizer import PromptTokenizer
from runtime.video import Video, read_frames, read_metadata
from tests import tiny
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
GPU = (ROOT / "profiles/gpus/rtx4070.yaml").read_text()
MODEL = (ROOT / "profiles/models/demo.yaml").read_text()
SECONDS = 8.0  # for the longest file that is read, on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ------------------------------------------------------------------------------------ profiles and manifests


def laughs(open_: str, close: str, of: str = "{}") -> str:
    """Ten lines of which each names the one before it nine times."""
    lines = [f"a0: &a0 {open_}{of.format('x')}{close}"]
    for n in range(9):
        lines.append(f"a{n + 1}: &a{n + 1} {open_}{of.format(','.join([f'*a{n}'] * 9))}{close}")
    return "\n".join(lines) + "\n"


SYSTEM = "object/apply:os.system ['touch mark']"
TEXTS = {
    "laughs": laughs("[", "]"),
    "laughs in a field": GPU.replace("description:", "description: &a [x, x]\nvae: [*a, *a]\nname: ", 1),
    "laughing merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{','.join([f'*a{n}'] * 9)}]}}\n" for n in range(9)),
    "itself": "name: &a [*a]",
    "itself merged": "&a {<<: *a}",
    "code": f"name: !!python/{SYSTEM}",
    "code by another name": f"%TAG ! tag:yaml.org,2002:python/\n---\nname: !{SYSTEM}",
    "a module": "name: !!python/module:antigravity",
    "open brackets": "[" * 20_000,
    "brackets": "[" * 3000 + "]" * 3000,
    "maps": "{a: " * 2000 + "1" + "}" * 2000,
    "indents": "\n".join(" " * n + "a:" for n in range(700)),
    "dashes": "- " * 30_000,
    "digits": "vram_gb: " + "9" * 200_000,
    "hexadecimal": "vram_gb: 0x" + "f" * 200_000,
    "base sixty": "vram_gb: 1" + ":59" * 10_000,
    "base sixty, a fraction": "vram_gb: 1" + ":59" * 20_000 + ".5",
    "not a number": GPU.replace("vram_gb: 12", "vram_gb: .nan"),
    "infinity": GPU.replace("vram_gb: 12", "vram_gb: .inf"),
    "no such day": "name: 9999-99-99",
    "no such bool": "name: !!bool x",
    "no such time": "name: !!timestamp x",
    "no such int": "name: !!int x",
    "no such bytes": "name: !!binary '%%%'",
    "no such letter": 'name: "\\Uffffffff"',
    "half a letter": 'name: "\\ud800"',
    "a list for a key": "{[1]: 2}",
    "an odd map": "!!omap 3",
    "merged with a number": "<<: 3",
    "a version": "%YAML " + "9" * 5000 + ".1\n---\na: 1",
    "two documents": "name: a\n---\nname: b",
    "a NUL": "name: \x00",
    "nothing": "",
    "keys": "".join(f"k{n}: 1\n" for n in range(2000)),
    "a long list": "name: [" + "1," * 5_000 + "]",
    "letters": "name: " + "a " * 100_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_yaml_that_was_made_to_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    kinds: tuple[Any, ...] = (Profile, ModelManifest)
    for kind in kinds:
        begun = time.process_time()
        with pytest.raises(RequestError) as raised:
            parse(kind, text, "mine.yaml")
        assert time.process_time() - begun < SECONDS
        assert str(raised.value).startswith("mine.yaml") and "\n" not in str(raised.value)
        assert len(str(raised.value)) < 1000
    assert list(tmp_path.iterdir()) == []


def test_memory_for_a_bomb_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(TEXTS["laughing merges"])
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="line 2: \\*a0 is an alias"):
            load_profile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_the_longest_file_takes_seconds(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(("a: 1" + ":59" * MAX_YAML_BYTES)[:MAX_YAML_BYTES])
    begun = time.process_time()
    with pytest.raises(RequestError):
        load_profile(path)
    assert time.process_time() - begun < SECONDS


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
trees = st.recursive(
    values, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3)
)


def places_in(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree of dicts and lists."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [path for key in keys for path in [(*at, key), *places_in(tree[key], (*at, key))]]


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at `path`."""
    tree = copy.deepcopy(tree)
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return tree


@settings(max_examples=150)
@given(data=st.data())
def test_a_manifest_with_one_other_value(data: st.DataObject) -> None:
    import yaml

    kinds: list[tuple[Any, str]] = [(Profile, GPU), (ModelManifest, MODEL)]
    kind, text = data.draw(st.sampled_from(kinds))
    tree = yaml.safe_load(text)
    tree = changed(tree, data.draw(st.sampled_from(places_in(tree))), data.draw(trees))
    try:
        parse(kind, yaml.safe_dump(tree, allow_unicode=True), "mine.yaml")
    except RequestError as error:
        assert len(str(error)) < 1000


@settings(max_examples=150)
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>%@`'\"#?, \n\t0.~<=\\u"), max_size=60))
def test_any_yaml(text: str) -> None:
    with pytest.raises(RequestError):
        parse(Profile, text, "mine.yaml")


# ------------------------------------------------------------------------------------------------- tokenizers


@cache
def tokenizer_json() -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        tiny.save_tokenizer(Path(place) / "tokenizer.json")
        return dict(json.loads((Path(place) / "tokenizer.json").read_text()))


def use(path: Path) -> None:
    """Load and use a tokenizer; what it cannot do is a WeightsError, and no words are a RequestError."""
    try:
        tokens = PromptTokenizer(path, max_length=32)("A red fox runs at night, a zebra too.")
    except (WeightsError, RequestError) as error:
        assert str(path) in str(error) or "is empty" in str(error)
    else:
        assert len(tokens.ids) == 32


@settings(max_examples=200)
@given(data=st.data())
def test_a_tokenizer_with_one_other_value(place: Path, data: st.DataObject) -> None:
    content = tokenizer_json()
    content = changed(content, data.draw(st.sampled_from(places_in(content))), data.draw(trees))
    path = place / "tokenizer.json"
    path.write_text(json.dumps(content))
    use(path)


@settings(max_examples=60)
@given(content=trees)
def test_any_json_is_no_tokenizer(place: Path, content: Any) -> None:
    path = place / "any.json"
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"any\.json"):
        PromptTokenizer(path)


def normalizer(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return {"normalizer": inner}


LONGER = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100}
TABLE = base64.b64encode(struct.pack("<I", 2**32 - 1) + bytes(60)).decode()
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "longer and longer": (normalizer(*[LONGER] * 6), "too long"),
    "a long beginning": (normalizer({"type": "Prepend", "prepend": "x" * 10_000}), "too long"),
    "a table that is cut": (normalizer({"type": "Precompiled", "precompiled_charsmap": TABLE}), "is cut"),
    "a table of nothing": (normalizer({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), ""),
    "nested": (nested(400), ""),
    "a panic": ({"post_processor": tokenizer_json()["post_processor"] | {"special_tokens": {}}}, ""),
    "no pieces": ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, ""),
    "unknown beyond the pieces": ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["<pad>", 0]]}}, ""),
    "no word for unknown": ({"model": tokenizer_json()["model"] | {"unk_token": "[UNK]"}}, ""),
    "no expression": (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "",
    ),
}


@pytest.mark.parametrize(("change", "said"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_tokenizers_that_were_made_to_break(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json() | change))
    with pytest.raises(WeightsError, match=f"tokenizer.json.*{said}.*download it again"):
        PromptTokenizer(path)


def test_ids_beyond_the_text_encoders(tmp_path: Path) -> None:
    """On a GPU an id too large stops the whole process, after the weights were read."""
    content = copy.deepcopy(tokenizer_json())
    content["model"]["vocab"]["zebra"] = 4_000_000_000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="'zebra' the id 4000000000, and the text encoder has 32"):
        PromptTokenizer(path, vocab_size=32)
    tiny.save_tokenizer(path)
    assert PromptTokenizer(path, vocab_size=32)("red").n == 2


# ----------------------------------------------------------------------------------- latents and mp4 records


@cache
def latents() -> bytes:
    return save({"latents": torch.randn(16, 2, 4, 6)}, {"format": "t2v-latents", "fps": "8", "model": "demo"})


@settings(max_examples=120)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5))
def test_scribbled_latents(place: Path, flips: list[tuple[float, int]]) -> None:
    data = bytearray(latents())
    for where, value in flips:
        data[int(where * 8 + where * struct.unpack("<Q", latents()[:8])[0])] = value
    path = place / "a.latents.safetensors"
    path.write_bytes(data)
    try:
        saved = read_latents(path)
    except RequestError:
        return
    assert saved.latents.nbytes < 4 * len(data)


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "", "٣", "1e3", "²"])
def test_numbers_in_latents(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.latents.safetensors"
    path.write_bytes(
        save({"latents": torch.randn(16, 1, 2, 2)}, dict.fromkeys(("fps", "seed", "step"), number))
    )
    assert read_latents(path).seed in (None, 3)


def test_latents_that_lie_end_in_a_sentence(t2v: Run, workplace: Path) -> None:
    for metadata in ({"model": "/etc"}, {"model": "\x00"}, {"model": "nope"}, {"model": "../../etc/passwd"}):
        (workplace / "a.latents.safetensors").write_bytes(
            save({"latents": torch.randn(16, 1, 2, 2)}, metadata)
        )
        assert t2v("decode", "a.latents.safetensors").exit_code in (2, 3)


@pytest.mark.parametrize("fps", ["999999999999", "0", "121"])
def test_latents_of_an_odd_speed(t2v: Run, workplace: Path, fps: str) -> None:
    """Told before the decode if it was asked for; if only the file says so, the fallback's."""
    content = save({"latents": torch.randn(16, 1, 2, 2)}, {"model": "demo", "fps": fps})
    (workplace / "a.latents.safetensors").write_bytes(content)
    asked = t2v("decode", "a.latents.safetensors", "--fps", fps)
    assert asked.exit_code == 2 and f"fps is {fps}; expected 1 to 120" in asked.stderr
    assert t2v("decode", "a.latents.safetensors", "--output", "a.mp4").exit_code == 0


@cache
def mp4() -> bytes:
    import tempfile

    frames = np.random.default_rng(4).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as place:
        return Video(frames, 8, {"prompt": "fox", "seed": 3}).save(Path(place) / "a.mp4").read_bytes()


@settings(max_examples=100)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=20),
    cut=st.none() | st.floats(0, 1),
)
def test_scribbled_videos(place: Path, flips: list[tuple[float, int]], cut: float | None) -> None:
    data = bytearray(mp4())
    for where, value in flips:
        data[int(where * len(data))] = value
    path = place / "a.mp4"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    for read in (read_metadata, read_frames):
        try:
            read(path)
        except RequestError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("filler", [b"\xff", b"\x00", b"\x80", b"["])
def test_a_comment_of_any_bytes(tmp_path: Path, filler: bytes) -> None:
    data = mp4()
    at = data.index(b'{"prompt"')
    path = tmp_path / "a.mp4"
    path.write_bytes(data[:at] + filler * 20 + data[at + 20 :])
    with pytest.raises(RequestError, match="does not say how it was made"):
        read_metadata(path)


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    """What calls itself mp4 and lists other files is a way to have them read, or fetched."""
    (tmp_path / "real.mp4").write_bytes(mp4())
    for text in (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1\nreal.mp4\n",
        "ffconcat version 1.0\nfile real.mp4\n",
    ):
        (tmp_path / "list.mp4").write_text(text)
        for read in (read_metadata, read_frames):
            with pytest.raises(RequestError, match="expected an mp4 file"):
                read(tmp_path / "list.mp4")
