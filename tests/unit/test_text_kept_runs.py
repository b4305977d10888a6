"""Runs that keep the text's keys and values end as those that do not, bit for bit, whatever comes between."""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.errors import WeightsError
from runtime.layers.kept_text import KeptText
from runtime.memory.plan import Blocks, Plan
from runtime.parts import PlannedParts
from runtime.pipeline import Pipeline
from runtime.request import Request, check
from runtime.resume import ResumePoint
from runtime.transformer import CrossAttention, TransformerConfig
from tests import tiny

LAYERS, STEPS = 4, 4
FOUR = TransformerConfig(128, 256, num_heads=1, num_layers=LAYERS, text_dim=64)
PLACES = {
    "resident": Blocks((0, 1, 2, 3), (), 0),
    "stored": Blocks((), (), 2),
    "mixed": Blocks((1,), (), 1),
    "last resident": Blocks((0, 3), (), 2),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with four blocks, in 8 bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TRANSFORMER", FOUR)
        return tiny.build(tmp_path_factory.mktemp("four") / "weights", ("fp8",))


@pytest.fixture(scope="module")
def shared(weights: Path) -> Iterator[Pipeline]:
    with Pipeline.load(weights, model=weights / "distill_fp8", profile="cpu", device="cpu") as pipe:
        yield pipe


def request(number: int = 0) -> Request:
    return Request(prompt=tiny.PROMPTS[number], seed=11 + number, **tiny.SMALL)  # type: ignore[arg-type]


def guided(pipe: Pipeline) -> Pipeline:
    """The same pipeline, as if its model were none that is distilled."""
    other = copy.copy(pipe)
    sampling = pipe.manifest.sampling.model_copy(update={"distilled": False, "guidance": 4.0})
    other.manifest = pipe.manifest.model_copy(update={"sampling": sampling})
    return other


def place(pipe: Pipeline, blocks: Blocks, text_kv: bool) -> Plan:
    """Have it follow such a plan, and take it for the one that it has made."""
    pipe._prepare(_checked(pipe))
    assert pipe.plan is not None
    plan = replace(pipe.plan, blocks=blocks, text_kv=text_kv)
    pipe.fitting.plan = plan
    pipe.parts.follow(plan)
    return plan


def _checked(pipe: Pipeline) -> Any:
    return check(request(), pipe.manifest, "cpu")


def parts_of(pipe: Pipeline) -> PlannedParts:
    assert isinstance(pipe.parts, PlannedParts)
    return pipe.parts


def points(pipe: Pipeline, asked: Request, start: ResumePoint | None = None) -> list[ResumePoint]:
    """The points of a run to its end, copied as another process would have them."""
    stages = pipe.stages(asked, start)
    return [copy.deepcopy(stage.point) for stage in stages if stage.point is not None]


def latents(found: list[ResumePoint]) -> list[Tensor]:
    return [point.latents for point in found if point.latents is not None]


def assert_same(found: list[ResumePoint], wanted: list[ResumePoint], what: str) -> None:
    pairs = list(zip(latents(found), latents(wanted)[-len(latents(found)) :], strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"{what}: largest difference of the latents {difference}")
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def expected(shared: Pipeline) -> dict[tuple[int, int], list[ResumePoint]]:
    """(texts, prompt) -> the points of a run with all blocks resident that keeps nothing."""
    found = {}
    for texts in (1, 2):
        pipe = guided(shared) if texts == 2 else shared
        place(pipe, PLACES["resident"], text_kv=False)
        for number in (0, 1):
            found[texts, number] = points(pipe, request(number))
    return found


class Counted:
    """How often text became keys and values, and how often blocks attended to them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made = self.used = 0
        make, attend = CrossAttention.keys_values, CrossAttention.forward

        def keys_values(*args: Any) -> Any:
            self.made += 1
            return make(*args)

        def forward(*args: Any) -> Any:
            self.used += 1
            return attend(*args)

        patch.setattr(CrossAttention, "keys_values", keys_values)
        patch.setattr(CrossAttention, "forward", forward)


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("blocks", PLACES.values(), ids=PLACES.keys())
def test_two_prompts_and_what_is_read_for_them(
    shared: Pipeline,
    expected: dict[Any, list[ResumePoint]],
    monkeypatch: pytest.MonkeyPatch,
    blocks: Blocks,
    texts: int,
) -> None:
    pipe = guided(shared) if texts == 2 else shared
    plan, parts = place(pipe, blocks, text_kv=True), parts_of(pipe)
    sizes = plan.inputs.sizes.blocks
    assert sizes.text_stored == sizes.text_matrices == 2 * 128 * 128
    streaming = LAYERS - len(blocks.resident)
    counted = Counted(monkeypatch)
    parts.stream.load_residents()
    for number in (0, 1, 1):
        counted.made = counted.used = 0
        before = parts.stream.counts
        assert_same(points(pipe, request(number)), expected[texts, number], f"{texts} texts")
        after = parts.stream.counts
        assert counted.made == LAYERS * texts and counted.used == LAYERS * STEPS * texts
        each = texts * sizes.stored + (STEPS - 1) * texts * (sizes.stored - sizes.text_stored)
        assert after.copied_bytes - before.copied_bytes == streaming * each
        reads = [counts.reads.disk_bytes + counts.reads.cached_bytes for counts in (before, after)]
        assert reads[1] - reads[0] == streaming * each
        assert not parts._kept  # they have left before the decode


@pytest.mark.parametrize("texts", [1, 2])
def test_a_run_that_goes_on_from_any_point_makes_its_own(
    shared: Pipeline, expected: dict[Any, list[ResumePoint]], monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    pipe = guided(shared) if texts == 2 else shared
    place(pipe, PLACES["mixed"], text_kv=True)
    monkeypatch.setattr(pipe.fitting, "prepare", lambda *_: None)  # known text states would be planned anew
    counted = Counted(monkeypatch)
    for start in expected[texts, 0][:-1]:
        counted.made = 0
        assert_same(points(pipe, request(0), start), expected[texts, 0], f"from step {start.step}")
        assert counted.made == LAYERS * texts


@pytest.mark.parametrize("left_at", [0, 1, 2, 3])
def test_a_run_that_is_left_between_two_steps_leaves_nothing_to_the_next(
    shared: Pipeline, expected: dict[Any, list[ResumePoint]], left_at: int
) -> None:
    place(shared, PLACES["stored"], text_kv=True)
    stages = shared.stages(request(0))
    for stage in stages:
        if stage.point is not None and stage.point.step == left_at:
            break
    stages.close()  # type: ignore[attr-defined]
    assert_same(points(shared, request(1)), expected[1, 1], f"after a run left at step {left_at}")


@pytest.fixture
def load(weights: Path) -> Iterator[Callable[[], Pipeline]]:
    opened: list[Pipeline] = []

    def loaded() -> Pipeline:
        pipe = Pipeline.load(
            weights, model=weights / "distill_fp8", profile="cpu", device="cpu", request=request()
        )
        opened.append(pipe)
        return pipe

    yield loaded
    for pipe in opened:
        pipe.close()


@pytest.mark.parametrize(
    ("blocks", "call"),
    [
        ("stored", 3),
        ("stored", 4),
        ("last resident", 4),
        ("last resident", 6),
        ("stored", 8),
        ("resident", 16),
    ],
)
def test_a_step_down_in_the_middle_of_a_forward(
    load: Callable[[], Pipeline],
    expected: dict[Any, list[ResumePoint]],
    monkeypatch: pytest.MonkeyPatch,
    blocks: str,
    call: int,
) -> None:
    """What is kept leaves first, and nothing else changes: the bits are the same from there on."""
    pipe = load()
    place(pipe, PLACES[blocks], text_kv=True)
    inner, left = CrossAttention.forward, [call]
    kept_then: list[KeptText] = []

    def forward(*args: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            kept_then.extend(parts_of(pipe)._kept)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args)

    monkeypatch.setattr(CrossAttention, "forward", forward)
    found = points(pipe, request(0))
    assert_same(found, expected[1, 0], f"memory ran out at call {call}")
    assert pipe.plan is not None and not pipe.plan.text_kv
    assert len(kept_then) == 1 and kept_then[0].nbytes == 0
    assert len(pipe.fitting.stepped_down) == 1 and "keys and values" in pipe.fitting.stepped_down[0]
    assert_same(points(pipe, request(1)), expected[1, 1], "the next prompt")


def test_a_plan_that_still_keeps_them_goes_on_with_what_is_made(
    load: Callable[[], Pipeline], expected: dict[Any, list[ResumePoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load()
    plan = place(pipe, PLACES["last resident"], text_kv=True)
    counted = Counted(monkeypatch)
    found = []
    for stage in pipe.stages(request(0)):
        if stage.point is not None:
            found.append(copy.deepcopy(stage.point))
            if stage.point.step in (1, 2):
                blocks = PLACES["stored" if stage.point.step == 1 else "mixed"]
                pipe.parts.follow(replace(plan, blocks=blocks))
    assert_same(found, expected[1, 0], "placed anew between steps")
    assert counted.made == LAYERS


@pytest.mark.parametrize("call", range(1, 2 * LAYERS + 2))
def test_a_failure_in_any_block_of_the_first_forwards(
    shared: Pipeline, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """With a plan that keeps them all the same, and two texts that take turns."""
    parts, plan = parts_of(shared), place(shared, PLACES["stored"], text_kv=False)
    generator = torch.Generator().manual_seed(call)
    noise = torch.randn(1, 16, 2, 4, 6, generator=generator)
    texts = [torch.randn(1, 512, 64, generator=generator).bfloat16() for _ in range(2)]
    times = torch.tensor([[937.5], [500.0]])

    def velocity(of_texts: Any, at: int) -> Tensor:
        step, text = divmod(at, 2)
        return parts.transformer.velocity(noise, of_texts[text][step])

    with torch.inference_mode():
        of_texts = parts.conditions(times, texts)
        wanted = [velocity(of_texts, at) for at in range(4)]
        plan = replace(plan, text_kv=True)
        parts.follow(plan)
        of_texts = parts.conditions(times, texts)
        parts.expect(4)
        inner, left = CrossAttention.forward, [call]

        def forward(*args: Any) -> Tensor:
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(*args)

        monkeypatch.setattr(CrossAttention, "forward", forward)
        for at in range(4):
            try:
                found = velocity(of_texts, at)
            except torch.OutOfMemoryError:
                parts.follow(plan)
                found = velocity(of_texts, at)
            assert torch.equal(found, wanted[at])
        assert left[0] < 0 and all(of_text[0].kept.complete for of_text in of_texts)  # type: ignore[union-attr]


def test_made_anew_when_they_are_computed_otherwise(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage that a broken kernel made must not outlive the kernel."""
    parts, plan = parts_of(pipe := load()), place(pipe, PLACES["mixed"], text_kv=True)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 16, 2, 4, 6, generator=generator)
    texts = [torch.randn(1, 512, 64, generator=generator).bfloat16() for _ in range(2)]
    times = torch.tensor([[937.5], [500.0], [20.0]])
    make = CrossAttention.keys_values

    def velocities(of_texts: Any, step: int) -> list[Tensor]:
        return [parts.transformer.velocity(noise, conditions[step]) for conditions in of_texts]

    with torch.inference_mode():
        parts.follow(replace(plan, text_kv=False))
        wanted = [velocities(parts.conditions(times, texts), step) for step in range(3)]
        parts.follow(plan)
        of_texts = parts.conditions(times, texts)
        monkeypatch.setattr(CrossAttention, "keys_values", lambda *args: tuple(7 * t for t in make(*args)))
        assert not torch.equal(velocities(of_texts, 0)[1], wanted[0][1])
        monkeypatch.setattr(CrossAttention, "keys_values", make)
        assert not torch.equal(velocities(of_texts, 1)[1], wanted[1][1])  # as they were kept
        of_texts = parts.conditions(times, texts)
        for step in (1, 2):
            found = velocities(of_texts, step)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted[step], strict=True))


def test_a_file_that_changes_after_the_first_step_is_one_error(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    directory = tmp_path / "weights" / "distill_fp8"
    with Pipeline.load(directory, model=directory, profile="cpu", device="cpu", request=request()) as pipe:
        place(pipe, PLACES["stored"], text_kv=True)
        with pytest.raises(WeightsError, match=r"block_2\.safetensors (changed while|ends inside)"):
            for stage in pipe.stages(request()):
                if stage.point is not None and stage.point.step == 1:
                    (directory / "block_2.safetensors").write_bytes(b"gone")
