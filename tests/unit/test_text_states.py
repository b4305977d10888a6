"""Text states on disk: known prompts need no encoder, and a broken cache costs a note and no video."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoint import cache as places
from runtime import loading
from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.text_states import TextCache, TextStates, encoder_digest, read_states, write_states
from runtime.video import read_frames, read_metadata
from tests.conftest import Run
from tests.tiny import PROMPTS, SMALL

DIM = 64


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ids(seed: int, n: int = 9) -> list[int]:
    return torch.randint(2, 250_000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ------------------------------------------------------------------------------------------------ the cache


def test_what_is_kept_is_found_as_it_was(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "encoder", "bf16 here")
    assert cache.find(ids(1), DIM) is None
    cache.keep(ids(1), rows(9, 1))
    found = TextCache(tmp_path, "encoder", "bf16 here").find(ids(1), DIM)
    assert found is not None and found.dtype == torch.bfloat16 and torch.equal(found, rows(9, 1))
    assert cache.path(ids(1)).stat().st_size < 9 * DIM * 2 + 700  # no rows of padding
    others = (
        TextCache(tmp_path, "other encoder", "bf16 here").find(ids(1), DIM),
        TextCache(tmp_path, "encoder", "fp32 here").find(ids(1), DIM),
        cache.find(ids(2), DIM),
        cache.find([*ids(1), 1], DIM),
    )
    assert others == (None, None, None, None) and cache.take_notes() == ()


def test_the_oldest_go_when_it_grows(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "e", "c")
    foreign = cache.directory / "notes.safetensors"
    for seed in range(4):
        cache.keep(ids(seed), rows(9, seed))
        os.utime(cache.path(ids(seed)), (1000 + seed, 1000 + seed))
    foreign.write_bytes(b"x" * 5000)
    one = cache.path(ids(0)).stat().st_size
    assert cache.find(ids(0), DIM) is not None  # used, so young again
    cache.limit = 3 * one
    cache.keep(ids(4), rows(9, 4))
    assert [cache.path(ids(seed)).exists() for seed in range(5)] == [True, False, False, True, True]
    assert foreign.exists()
    cache.limit = 1
    cache.keep(ids(5), rows(9, 5))
    assert [path.name for path in cache.directory.iterdir() if path != foreign] == [cache.path(ids(5)).name]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_text("not a tensor")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "nan":
        states = read_states(path)
        broken = states.rows.clone()
        broken[3, 5] = torch.nan
        write_states(path, TextStates(broken, states.ids, "", states.encoder, states.computed))
    elif how == "another's":
        states = read_states(path)
        write_states(path, TextStates(states.rows, states.ids, "", "someone", states.computed))
    elif how == "narrow":
        states = read_states(path)
        write_states(path, TextStates(states.rows[:, :8], states.ids, "", states.encoder, states.computed))
    elif how == "no metadata":
        save_file(load_file(path), path)


@pytest.mark.parametrize("how", ["cut", "text", "empty", "nan", "another's", "narrow", "no metadata"])
def test_a_damaged_file_is_told_once_and_written_again(tmp_path: Path, how: str) -> None:
    cache = TextCache(tmp_path, "e", "c")
    cache.keep(ids(1), rows(9, 1))
    damage(cache.path(ids(1)), how)
    assert cache.find(ids(1), DIM) is None and cache.find(ids(1), DIM) is None
    (note,) = cache.take_notes()
    assert str(cache.path(ids(1))) in note
    cache.keep(ids(1), rows(9, 2))
    found = cache.find(ids(1), DIM)
    assert found is not None and torch.equal(found, rows(9, 2))


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    cache = TextCache(tmp_path / "file", "e", "c")
    for seed in range(3):
        assert cache.find(ids(seed), DIM) is None
        cache.keep(ids(seed), rows(9, seed))
    (note,) = cache.take_notes()
    assert "cannot be written" in note and "--cache" in note and cache.take_notes() == ()


def test_an_encoder_is_its_bytes_and_not_its_place() -> None:
    here, there = {"a/t5.pth": "sha256:1", "a/x": "sha256:2"}, {"b/x": "sha256:2", "b/t5.pth": "sha256:1"}
    assert encoder_digest(here) == encoder_digest(there) != encoder_digest({"a/t5.pth": "sha256:1"})


# --------------------------------------------------------------------------------------------- the pipeline


def seal(patch: pytest.MonkeyPatch) -> None:
    """Fail the test if anybody loads a text encoder."""
    for name in ("load_text_encoder", "stream_text_encoder"):
        patch.setattr(loading, name, lambda *_, **__: pytest.fail("the encoder was loaded"))


def test_a_known_prompt_needs_no_encoder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(variant: str = "distill_models") -> Pipeline:
        request = Request(PROMPTS[1], **SMALL)
        return Pipeline.load(model=tiny_checkpoint / variant, device="cpu", cache=tmp_path, request=request)

    first = load()
    assert not first.known_text(PROMPTS[1])
    computed = first(PROMPTS[1], num_frames=5, height=32, width=48)
    without = Pipeline.load(model=tiny_checkpoint / "distill_models", device="cpu")
    assert not without.known_text(PROMPTS[1])
    plain = without(PROMPTS[1], num_frames=5, height=32, width=48)
    with monkeypatch.context() as sealed:
        seal(sealed)
        second = load()
        spaced = f"  {PROMPTS[1].replace(' ', '  ')}"  # the same text to the model
        assert second.known_text(PROMPTS[1]) and second.known_text(spaced)
        assert not second.known_text(PROMPTS[0])
        cached = second(spaced, num_frames=5, height=32, width=48)
    assert np.array_equal(computed.frames, cached.frames) and np.array_equal(plain.frames, cached.frames)
    assert [video.metadata["text_states"] for video in (computed, cached)] == ["computed", "cached"]
    assert not load("distill_fp8").known_text(PROMPTS[1])  # another encoder file


def test_notes_come_with_the_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    pipe = Pipeline.load(model=tiny_checkpoint, device="cpu", cache=tmp_path / "file")
    for expected in (1, 0):
        stage = next(pipe.stages(Request(PROMPTS[0], **SMALL)))
        assert stage.phase == "text" and len(stage.notes) == expected


# ------------------------------------------------------------------------------------------------ the program


def test_the_second_video_of_a_prompt(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small("--output", "a.mp4").exit_code == 0
    with monkeypatch.context() as sealed:
        seal(sealed)
        assert small("--output", "b.mp4").exit_code == 0
    assert (read_frames("a.mp4") == read_frames("b.mp4")).all()
    told = [read_metadata(f"{name}.mp4")["text_states"] for name in "ab"]
    assert told == ["computed", "cached"]
    found = list((tmp_path / "user-cache/fourstep/text-states").iterdir())
    assert len(found) == 1
    for place in (("--cache", "none"), ("--cache", tmp_path / "other")):
        assert small("--output", "d.mp4", "--overwrite", *place).exit_code == 0
        assert read_metadata("d.mp4")["text_states"] == "computed"
    assert len(list((tmp_path / "other/text-states").iterdir())) == 1

    found[0].write_bytes(b"damaged")
    result = small("--output", "e.mp4", "--json")
    assert result.exit_code == 0 and f"{found[0]} is damaged" in result.stderr
    assert len(read_states(found[0]).ids) > 3


def test_text_states_out_and_in(small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fox = ("--prompt", PROMPTS[1], "--cache", "none")
    assert small(*fox, "--text-states", "texts/fox.safetensors", "--output", "a.mp4").exit_code == 0
    kept = read_states(workplace / "texts/fox.safetensors")
    assert kept.prompt == PROMPTS[1] and kept.rows.shape == (len(kept.ids), DIM) and "torch" in kept.computed
    before = Path("texts/fox.safetensors").read_bytes()
    given = ("--cache", "none", "--text-states", "texts/fox.safetensors")
    with monkeypatch.context() as sealed:
        seal(sealed)
        assert small(*given, "--output", "b.mp4").exit_code == 0  # the file has the prompt
        assert small(*given, "--output", "c.mp4", "--prompt", f" {PROMPTS[1]}\n").exit_code == 0
    for name in ("b.mp4", "c.mp4"):
        assert (read_frames("a.mp4") == read_frames(name)).all()
        record = read_metadata(name)
        assert record["text_states"] == "given" and record["prompt"].strip() == PROMPTS[1]
    assert Path("texts/fox.safetensors").read_bytes() == before


def test_text_states_that_do_not_fit(small: Run, tiny_checkpoint: Path, workplace: Path) -> None:
    file = ("--text-states", "fox.safetensors")
    assert small("--prompt", PROMPTS[1], *file, "--output", "a.mp4").exit_code == 0
    kept = read_states(workplace / "fox.safetensors")

    def refused(*arguments: object, **extra: object) -> str:
        result = small(*file, *arguments, **extra)
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert not list(Path().rglob("*.run.safetensors"))
        return result.stderr

    assert "A red fox runs" in refused("--prompt", PROMPTS[0])
    assert "another text encoder" in refused(model=tiny_checkpoint / "distill_fp8")
    other = TextStates(kept.rows, (*kept.ids[:-2], 5, 1), kept.prompt, kept.encoder, kept.computed)
    write_states(workplace / "fox.safetensors", other)
    result = small(*file, "--output", "b.mp4")  # told by the tokenizer, once it is there
    assert result.exit_code == 2 and "other tokens" in result.stderr
    Path("b.run.safetensors").unlink()
    Path("fox.safetensors").write_text(json.dumps({"not": "tensors"}))
    assert "cannot be read as text states" in refused()
    nowhere = small("--text-states", "/proc/fox.safetensors")
    assert nowhere.exit_code == 2 and "--text-states" in nowhere.stderr


@pytest.mark.parametrize("text", ["", "[]", "[1, -2]", "[1.5]", "{}", "[true]", '["a"]', "[1]"])
def test_ids_that_are_none(tmp_path: Path, text: str) -> None:
    metadata = {"format": "t2v-text-states", "prompt": "x", "ids": text}
    save_file({"text_states": rows(9, 1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(RequestError, match=r"x\.safetensors"):
        read_states(tmp_path / "x.safetensors")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "CONTAINER_CACHE", tmp_path / "volume")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert places.choose_cache(None) == tmp_path / "xdg/fourstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.choose_cache(None) == tmp_path / ".cache/fourstep"
    (tmp_path / "volume").mkdir()
    assert places.choose_cache(None) == tmp_path / "volume"
    assert places.choose_cache("none") is None
    assert places.choose_cache(str(tmp_path / "mine")) == tmp_path / "mine"
