"""Whatever a bad attention or a bad kernel does, the video is that of the next way, and it is told."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime.denoising
import runtime.text_encoder
import runtime.transformer
from runtime.errors import OutputCheckError, RequestError
from runtime.guard import Fault, judge
from runtime.kernels import launch
from runtime.layers.backends import BACKENDS, LAST_RESORT, Backend, sdpa
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.stages import Stage
from runtime.tuning import FUSED_KERNELS, Store
from runtime.video import Video, read_metadata
from runtime.ways import FUSED, PLAIN, Ways, choose_ways
from tests import tiny
from tests.conftest import Run

REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]
BLOCKS, STEPS = tiny.TRANSFORMER.num_layers, 4
NUMBERS = itertools.count()
KINDS = ("nan", "one nan", "zeros", "garbage", "half", "last rows", "neighbour")


def spoilt(kind: str, right: Tensor) -> Tensor:
    """`right` (B, L, ...) as a broken kernel leaves it."""
    wrong, generator = right.clone(), torch.Generator().manual_seed(7)
    garbage = torch.randn(right.shape, generator=generator).to(right) * right.float().std()
    if kind == "nan":
        wrong[:] = float("nan")
    elif kind == "one nan":
        wrong[0, -1].view(-1)[-1] = float("nan")
    elif kind == "zeros":
        wrong[:] = 0
    elif kind == "garbage":
        wrong = garbage
    elif kind == "half":
        wrong = wrong / 2
    elif kind == "last rows":
        wrong[:, -2:] = garbage[:, -2:]
    else:
        wrong = right.roll(1, 1)  # each row is the one before
    return wrong


class Spoiler:
    """Spoils results from the call `first` on, once it is armed; of blocks, the one `only`."""

    def __init__(self, kind: str, first: int = 0, only: int | None = None) -> None:
        self.kind, self.first, self.only = kind, first, only
        self.armed, self.calls = False, 0

    def __call__(self, right: Tensor) -> Tensor:
        if not self.armed:
            return right
        call, self.calls = self.calls, self.calls + 1
        here = call >= self.first and self.only in (None, call % BLOCKS)
        return spoilt(self.kind, right) if here else right


class Remembering:
    """A memory for one test."""

    def __init__(self, *names: str) -> None:
        self.names = dict.fromkeys(names, "before")

    def avoided(self) -> set[str]:
        return {*self.names}

    def avoid(self, name: str, reason: str) -> None:
        self.names[name] = reason

    def take_notes(self) -> tuple[str, ...]:
        return ()


@pytest.fixture
def add_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """add(spoiler, bits=8) is the name of a backend that is torch's attention, but for what is spoilt."""

    def add(spoiler: Callable[[Tensor], Tensor], bits: int = 8) -> str:
        name = f"test-{next(NUMBERS)}"  # what was found under a name is remembered for the process

        def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return spoiler(sdpa(q, k, v, scale))

        monkeypatch.setitem(BACKENDS, name, Backend(name, bits, lambda _: run, lowest=(0, 0)))
        return name

    return add


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.load(
        tiny_checkpoint, model=tiny_checkpoint, profile="cpu", device="cpu", request=REQUEST
    ) as pipe:
        yield pipe


@pytest.fixture
def load(shared: Pipeline) -> Iterator[Callable[..., Pipeline]]:
    """load(attention, fused) is the pipeline with a way of its own, as a fresh process would have it."""

    def loaded(attention: str = "auto", *, fused: bool = False) -> Pipeline:
        leave()
        config = shared.parts.transformer.config
        size = (12, config.text_len, config.num_heads, config.head_dim, torch.float32)
        shared.ways = choose_ways("cpu", *size, attention, memory=Remembering())
        if fused:
            shared.ways.kernels = FUSED
        return shared

    def leave() -> None:
        if shared.ways.kernel_samples is not None:
            shared.ways.kernel_samples.close()

    yield loaded
    leave()


@pytest.fixture(scope="module")
def usual(shared: Pipeline) -> Video:
    """The undisturbed run of torch's attention and plain kernels."""
    shared.ways = Ways("cpu")
    return outcome(shared)[0]


def outcome(pipe: Pipeline, request: Request = REQUEST) -> tuple[Video, list[str]]:
    stages: list[Stage] = [*pipe.stages(request)]
    video = stages[-1].video
    assert video is not None
    return video, [note for stage in stages for note in stage.notes]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_bad_attention_is_repeated_with_the_next(
    load: Callable[..., Pipeline], add_backend: Callable[..., str], usual: Video, kind: str, step: int
) -> None:
    spoiler = Spoiler(kind, first=(step - 1) * BLOCKS)
    name = add_backend(spoiler)
    pipe = load(name)
    assert pipe.ways.bits == 8
    spoiler.armed = True
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames)
    (note,) = notes
    assert note.startswith(f"denoise step {step} went wrong with attention {name}")
    assert "repeated with attention sdpa" in note
    assert video.metadata["ways"]["attention"] == "sdpa"
    (told,) = video.metadata["fell_back"]
    assert told.startswith(f"denoise step {step}: attention {name}") and "attention is" in told
    assert pipe.ways._memory.avoided() == {name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only", range(BLOCKS))
def test_bad_attention_of_one_block_is_enough(
    load: Callable[..., Pipeline], add_backend: Callable[..., str], usual: Video, kind: str, only: int
) -> None:
    spoiler = Spoiler(kind, only=only)
    pipe = load(add_backend(spoiler, bits=16))
    spoiler.armed = True
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames) and len(notes) == 1
    assert f"sample {only + 1} of {BLOCKS}" in notes[0]


@pytest.mark.parametrize("name", ["norm_of", "add_norm", "gelu_for", "gated_add", "norm_rope"])
@pytest.mark.parametrize("kind", ["nan", "one nan", "zeros", "garbage", "last rows"])
def test_a_step_of_bad_kernels_is_repeated_with_their_twins(
    load: Callable[..., Pipeline], usual: Video, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Each fused operation, spoilt from some call on wherever the kernel would run, in every other call."""
    right, first = getattr(runtime.transformer, name), (len(name) + len(kind)) % 7
    calls = itertools.count()

    def kernel(*args: Any, **options: Any) -> Any:
        made = right(*args, **options)
        if launch._twins_only:
            return made
        call = next(calls)
        if call < first or call % 2:
            return made
        return (made[0], spoilt(kind, made[1])) if isinstance(made, tuple) else spoilt(kind, made)

    monkeypatch.setattr(runtime.transformer, name, kernel)
    pipe = load(fused=True)
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames)
    (note,) = notes
    assert note.startswith("denoise step ") and "repeated with attention sdpa with plain kernels" in note
    assert video.metadata["ways"] == {"attention": "sdpa", "text_attention": "sdpa", "kernels": "plain"}
    assert pipe.ways._memory.avoided() == {FUSED_KERNELS}


def test_undisturbed_runs_fall_back_nowhere(load: Callable[..., Pipeline], usual: Video) -> None:
    pipe = load(fused=True)  # so that kernels are sampled too: here they are their twins
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames) and not notes
    assert "fell_back" not in video.metadata
    assert video.metadata["ways"] == {"attention": "sdpa", "text_attention": "sdpa", "kernels": "fused"}
    other = Request(prompt=tiny.PROMPTS[1], height=64, width=32, frames=9, sampler="euler", steps=4)
    outcome(pipe, other)
    assert not pipe.ways.fell_back


def test_a_video_tells_of_its_own_falls_alone(
    load: Callable[..., Pipeline], add_backend: Callable[..., str], usual: Video
) -> None:
    """The second is made in the lower way from its beginning; the third falls again."""
    spoiler = Spoiler("garbage")
    pipe = load(add_backend(spoiler), fused=True)
    spoiler.armed = True
    first, second = outcome(pipe)[0], outcome(pipe)[0]
    assert np.array_equal(first.frames, usual.frames) and np.array_equal(second.frames, usual.frames)
    assert len(first.metadata["fell_back"]) == 1 and "fell_back" not in second.metadata
    assert first.metadata["ways"] == second.metadata["ways"]
    assert second.metadata["ways"]["attention"] == "sdpa"
    stages = pipe.stages(REQUEST)
    next(stages)
    pipe.ways.lower_kernels(Fault("a test"), "decode")
    third = [*stages][-1].video
    assert third is not None and third.metadata["fell_back"] == pipe.ways.fell_back[1:]
    assert third.metadata["ways"]["kernels"] == PLAIN and len(pipe.ways.fell_back) == 2


@pytest.mark.parametrize("short", [1, 2])
def test_a_guided_step_that_runs_out_of_memory_is_sampled_whole(
    load: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    """In the middle of its first or second forward: samples of what was left half way do not count."""
    request = replace(REQUEST, guidance=3.0, negative_prompt="blurred")
    pipe, forwards, told = load(fused=True), itertools.count(1), list[int]()
    sampling = pipe.manifest.sampling.model_copy(update={"distilled": False})
    monkeypatch.setattr(pipe, "manifest", pipe.manifest.model_copy(update={"sampling": sampling}))
    usual, _ = outcome(pipe, request)
    block, velocity = runtime.transformer.Block.forward, runtime.transformer.Transformer.velocity
    forward = 0

    def counted(*args: Any) -> Tensor:
        nonlocal forward
        forward = next(forwards)
        return velocity(*args)

    def failing(this: Any, *args: Any) -> Tensor:
        if forward == short and this is pipe.parts.transformer.blocks[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return block(this, *args)

    def judged(numbers: Any, envelope: Any, attention: Any, a: float, kernels: Any, k: float) -> Fault | None:
        told.append(len(attention))
        return judge(numbers, envelope, attention, a, kernels, k)

    monkeypatch.setattr(runtime.transformer.Transformer, "velocity", counted)
    monkeypatch.setattr(runtime.transformer.Block, "forward", failing)
    monkeypatch.setattr(pipe.fitting, "step_down", lambda *_: None)
    monkeypatch.setattr(runtime.denoising, "judge", judged)
    video, notes = outcome(pipe, request)
    assert np.array_equal(video.frames, usual.frames) and not notes
    assert next(forwards) == 2 * STEPS + short + 1 and told == [2 * BLOCKS] * STEPS


def test_what_the_memory_has_to_say_is_told_when_it_says_it(
    load: Callable[..., Pipeline], add_backend: Callable[..., str], tmp_path: Path
) -> None:
    """It learns of a bad backend in the middle of a run, and cannot write that down."""
    spoiler = Spoiler("half", first=BLOCKS)
    name = add_backend(spoiler)
    pipe = load(name)
    (tmp_path / "cache").write_text("a file in the place of the directory")
    pipe.ways._memory = store = Store(tmp_path / "cache")
    spoiler.armed = True
    stages = [*pipe.stages(REQUEST)]
    told = [(stage.phase, stage.step, note) for stage in stages for note in stage.notes]
    assert {(phase, step) for phase, step, _ in told} == {("denoise", 2)}
    assert "repeated with attention sdpa" in told[0][2] and "cannot be written" in told[-1][2]
    assert store.avoided() == {name} and not pipe.ways.take_notes()


def test_wrong_weights_go_all_the_way_down_and_nothing_is_remembered(
    load: Callable[..., Pipeline], add_backend: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = add_backend(lambda right: right)
    pipe = load(name, fused=True)
    velocity = runtime.transformer.Transformer.velocity
    monkeypatch.setattr(
        runtime.transformer.Transformer, "velocity", lambda *args: velocity(*args) * float("nan")
    )
    with pytest.raises(OutputCheckError, match=r"step 1 of 4 is wrong, with no other way left.*not finite"):
        outcome(pipe)
    assert [told.split(" -> ")[1].split(":")[0] for told in pipe.ways.fell_back] == [
        "attention sdpa with fused kernels",
        "attention sdpa with plain kernels",
        "attention sdpa-math with plain kernels",
    ]
    assert not pipe.ways._memory.avoided()


def test_a_decode_that_fails_its_check_is_repeated_with_plain_kernels(
    load: Callable[..., Pipeline], usual: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runtime.frames

    right = runtime.frames.frames_to_bytes
    calls = itertools.count()

    def black(frames: Tensor) -> Tensor:
        return right(frames) if launch._twins_only or next(calls) != 1 else 0 * right(frames)

    monkeypatch.setattr(runtime.frames, "frames_to_bytes", black)
    pipe = load(fused=True)
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames)
    assert len(notes) == 1 and "decode went wrong" in notes[0] and "one flat colour between" in notes[0]
    assert pipe.ways._memory.avoided() == {FUSED_KERNELS}
    pipe = load()  # plain from the start: nothing is left to try
    monkeypatch.setattr(runtime.frames, "frames_to_bytes", lambda frames: 0 * right(frames))
    with pytest.raises(OutputCheckError, match="flat"):
        outcome(pipe)


def test_text_states_that_are_not_finite_are_made_again(
    load: Callable[..., Pipeline], usual: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.text_encoder import TextEncoder

    forward = TextEncoder.forward

    def bad(*args: Any) -> Tensor:
        states = forward(*args)
        return states if launch._twins_only else states * float("nan")

    monkeypatch.setattr(TextEncoder, "forward", bad)
    pipe = load(fused=True)
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames) and "text encoder went wrong" in notes[0]
    monkeypatch.setattr(TextEncoder, "forward", lambda *args: forward(*args) * float("nan"))
    with pytest.raises(OutputCheckError, match="text states are not finite"):
        outcome(load())


@pytest.mark.parametrize("name", ["norm_of", "add_norm", "gelu_for"])
@pytest.mark.parametrize("kind", ["zeros", "moved", "nan"])
def test_text_states_of_kernels_that_are_wrong_are_made_again(
    name: str, kind: str, load: Callable[..., Pipeline], usual: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite or not: a block of the encoder says so, and the states are those of plain kernels."""
    right = getattr(runtime.text_encoder, name)

    def bad(*args: Any) -> Any:
        made = right(*args)
        if launch._twins_only:
            return made
        rows = made[1] if isinstance(made, tuple) else made
        wrong = {"zeros": rows * 0, "moved": rows.roll(1, -1), "nan": rows * float("nan")}[kind]
        return (made[0], wrong) if isinstance(made, tuple) else wrong

    monkeypatch.setattr(runtime.text_encoder, name, bad)
    pipe = load(fused=True)
    video, notes = outcome(pipe)
    assert np.array_equal(video.frames, usual.frames) and "text encoder went wrong" in notes[0]
    assert video.metadata["ways"]["kernels"] == "plain" and pipe.ways._memory.avoided() == {FUSED_KERNELS}


# --------------------------------------------------------------------------------------------------- choosing


def test_the_ladder_by_origin(add_backend: Callable[..., str]) -> None:
    def path(ladder: list[str], origin: str, fused: bool) -> list[str]:
        ways = Ways("cpu", ladder, fused=fused)
        told = []
        while (now := ways.lower(Fault("bad", origin), "step")) is not None:
            told.append(now.removeprefix("attention "))
        return told

    assert path(["sdpa", LAST_RESORT], "attention", True) == [
        "sdpa-math with fused kernels",
        "sdpa-math with plain kernels",
        "sdpa-math with plain kernels",  # now on the text too
    ]
    eight = add_backend(lambda right: right)
    assert path([eight, "sdpa", LAST_RESORT], "", True) == [
        "sdpa with fused kernels",
        "sdpa with plain kernels",
        "sdpa-math with plain kernels",
    ]
    assert path([eight, "sdpa", LAST_RESORT], "kernels", True)[0] == f"{eight} with plain kernels"
    assert path(["sdpa", LAST_RESORT], "", True) == [
        "sdpa with plain kernels",
        "sdpa-math with plain kernels",
    ]
    assert path(["sdpa", LAST_RESORT], "kernels", True)[0] == "sdpa with plain kernels"
    assert path(["sdpa", LAST_RESORT], "", False) == ["sdpa-math with plain kernels"]


def test_what_is_avoided_is_not_chosen_and_a_record_is_followed(add_backend: Callable[..., str]) -> None:
    size = (96, 16, 2, 64, torch.float32)
    name = add_backend(lambda right: right)
    assert choose_ways("cpu", *size).name == "sdpa"
    assert choose_ways("cpu", *size, LAST_RESORT).name == LAST_RESORT
    made = choose_ways("cpu", *size, name, memory=Remembering(name, "sdpa"))
    assert made.name == name and "wrong numbers on this GPU before" in made.take_notes()[0]
    assert made.lower(Fault("bad", "attention"), "step") == "attention sdpa-math with plain kernels"
    record = {"device": "cpu", "ways": {"attention": name, "text_attention": "sdpa", "kernels": "plain"}}
    assert choose_ways("cpu", *size, before=record).name == name
    assert choose_ways("cpu", *size, before=record | {"device": "cuda:0"}).name == "sdpa"
    gone = {"device": "cpu", "ways": {"attention": "sage2", "kernels": 3}}
    made = choose_ways("cpu", *size, before=gone)
    assert made.name == "sdpa" and "pixels may differ" in made.take_notes()[0]
    for wrong in ({"ways": 3}, {"device": "cpu", "ways": ["sdpa"]}, {}):
        assert choose_ways("cpu", *size, before=wrong).name == "sdpa"
    with pytest.raises(RequestError, match="unknown"):
        choose_ways("cpu", *size, "sage9")


# ------------------------------------------------------------------------------------------- the command line


def test_an_attention_is_asked_for_told_and_kept(small: Run, t2v: Run) -> None:
    done = small("--attention", LAST_RESORT, "--output", "a.mp4")
    assert done.exit_code == 0, done.stderr
    record = read_metadata(Path("a.mp4"))
    assert record["ways"]["attention"] == LAST_RESORT
    again = t2v("rerun", "a.mp4", "--output", "b.mp4")
    assert again.exit_code == 0, again.stderr
    assert read_metadata(Path("b.mp4"))["ways"] == record["ways"]
    other = t2v("rerun", "a.mp4", "--attention", "sdpa", "--output", "c.mp4")
    assert other.exit_code == 0 and read_metadata(Path("c.mp4"))["ways"]["attention"] == "sdpa"


@pytest.mark.parametrize(("name", "why"), [("sage9", "is unknown"), ("sdpa-cudnn", "does not work here")])
def test_an_attention_that_is_not_there_is_refused_before_loading(
    small: Run, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setenv("T2V_ATTENTION", name)
    done = small("--output", "a.mp4", "--json")
    assert done.exit_code == 2
    last = json.loads(done.stdout.splitlines()[-1])
    assert why in last["message"] and name in last["message"] and '"load"' not in done.stdout
    assert not [*Path().iterdir()]


def test_with_no_way_left_the_latents_are_on_the_disk_and_the_run_goes_on(
    small: Run, t2v: Run, add_backend: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small("--output", "whole.mp4")
    assert whole.exit_code == 0
    velocity = runtime.transformer.Transformer.velocity
    calls = itertools.count()

    def bad_from_step_three(*args: Any) -> Tensor:
        return velocity(*args) * (float("nan") if next(calls) >= 2 else 1)

    monkeypatch.setattr(runtime.transformer.Transformer, "velocity", bad_from_step_three)
    done = small("--output", "a.mp4", "--json")
    assert done.exit_code == 6
    last = json.loads(done.stdout.splitlines()[-1])
    assert "step 3 of 4 is wrong" in last["message"] and last["latents"]
    monkeypatch.setattr(runtime.transformer.Transformer, "velocity", velocity)
    resumed = t2v("resume", last["run_file"])
    assert resumed.exit_code == 0, resumed.stderr
    assert read_metadata(Path("a.mp4"))["resumed_after_step"] == 2
    assert read_metadata(Path("a.mp4"))["ways"]["kernels"] == PLAIN
