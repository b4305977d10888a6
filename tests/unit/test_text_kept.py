"""Keys and values of a text, made in its first forward alone: the same bits, and less to bring."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint
from runtime.errors import WeightsError
from runtime.memory import stream as stream_module
from runtime.memory.stored import matrix_modules
from runtime.memory.stream import BlockStream
from runtime.transformer import Condition, CrossAttention, Transformer
from tests.unit.checkpoint_fixtures import TRANSFORMER
from tests.unit.stream_fixtures import FakeLane, Faults, Placed, distance, resident, streamed, written

STEPS = 4
OF_TEXT = Transformer.OF_TEXT
PLACEMENTS = {
    "stored": Placed(),
    "cached": Placed((), (0, 1, 2)),
    "mixed": Placed((1,), (0,), 1),
    "last resident": Placed((2,), (1,), 2),
    "three slots": Placed((), (2,), 3),
    "resident": Placed((0, 1, 2), (), 0),
}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("fp8"), "transformer", "fp8", "blocks")


def latents_of(step: int, text: int) -> Tensor:
    return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(10 * step + text))


@torch.inference_mode()
def conditions_of(model: nn.Module, texts: int, seed: int = 0) -> list[list[Condition]]:
    """For each step the conditions of all texts, as a run has them."""
    assert isinstance(model, Transformer)
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(STEPS, 1, generator=generator) * 1000
    shape = (1, TRANSFORMER.text_len, TRANSFORMER.text_dim)
    made = [model.conditions(times, torch.randn(shape, generator=generator)) for _ in range(texts)]
    return [list(of_step) for of_step in zip(*made, strict=True)]


@torch.inference_mode()
def forward(model: nn.Module, of_steps: list[list[Condition]], step: int, text: int) -> Tensor:
    assert isinstance(model, Transformer)
    return model.velocity(latents_of(step, text), of_steps[step][text])


def run(model: nn.Module, of_steps: list[list[Condition]]) -> list[Tensor]:
    """The velocities of all steps and texts, in the order of a run."""
    return [forward(model, of_steps, n, i) for n, texts in enumerate(of_steps) for i in range(len(texts))]


@pytest.fixture(scope="module")
def expected(fp8: Checkpoint) -> dict[tuple[int, int], list[Tensor]]:
    """(texts, seed) -> what the loaded model gives that keeps nothing."""
    whole = resident(fp8)
    return {(n, seed): run(whole, conditions_of(whole, n, seed)) for n in (1, 2) for seed in (0, 1)}


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(distance(a, b) for a, b in zip(found, wanted, strict=True))


def keep(model: nn.Module, stream: BlockStream, texts: int, seed: int = 0) -> list[list[Condition]]:
    """Begin with texts as `Parts` does."""
    model.keep_text = True  # type: ignore[assignment]
    of_steps = conditions_of(model, texts, seed)
    stream.leave_out(OF_TEXT, after=texts)
    stream.expect(STEPS * texts)
    return of_steps


def sizes(stream: BlockStream) -> tuple[int, int]:
    """Bytes of a block's matrices, and of those that a lean pass brings; stored and copied alike here."""
    matrices = stream._stored[0].matrices
    lean = sum(m.nbytes for m in matrices if m.owner not in OF_TEXT)
    assert stream._stored[0].stored_bytes - lean == 2 * 128 * 128
    return stream._stored[0].stored_bytes, lean


# ------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_the_same_bits_and_exactly_the_bytes_that_are_needed(
    fp8: Checkpoint, expected: dict[Any, list[Tensor]], placement: Placed, texts: int
) -> None:
    with streamed(fp8, placement) as (model, stream):
        whole, lean = sizes(stream)
        copied = read = cached = 0
        residents, in_ram = len(placement.resident), len(placement.cached)
        stored = 3 - residents - in_ram
        for seed in (0, 1):  # a second prompt needs the matrices again
            difference = worst(run(model, keep(model, stream, texts, seed)), expected[texts, seed])
            print(f"{placement}, {texts} texts, prompt {seed}: largest difference {difference}")
            assert difference == 0
            first = seed == 0
            passes = texts * whole + (STEPS - 1) * texts * lean  # bytes of one streaming block
            copied += (3 - residents) * passes + residents * whole * first
            read += stored * passes + (residents + in_ram) * whole * first
            cached += in_ram * (passes - whole * first)
            counts = stream.counts
            assert counts.copied_bytes == copied
            assert counts.reads.disk_bytes + counts.reads.cached_bytes == read
            assert counts.cache_bytes == cached
        assert stream.device_bytes == (residents + placement.slots) * stream._stored[0].nbytes


def test_what_is_left_out_is_absent_and_never_a_number_of_another_block(fp8: Checkpoint) -> None:
    with streamed(fp8, Placed((1,), (), 1)) as (_, stream):
        stream.leave_out(OF_TEXT, after=1)
        for number in range(3):
            for index, block in enumerate(stream):
                for name, module in matrix_modules(block).items():
                    gone = number > 0 and index != 1 and name in OF_TEXT
                    assert module.weight.is_meta == gone
                    if gone:
                        x = torch.randn(1, 3, TRANSFORMER.dim, dtype=torch.bfloat16)
                        with pytest.raises((RuntimeError, IndexError)):
                            module(x)
        with pytest.raises(ValueError, match="no matrices at all"):
            stream.leave_out([*matrix_modules(stream[0])])
        stream.leave_out(())
        for block in stream:
            assert not any(m.weight.is_meta for m in matrix_modules(block).values())


def test_what_was_fetched_for_a_pass_that_never_came_is_not_taken_for_another(
    fp8: Checkpoint, expected: dict[Any, list[Tensor]]
) -> None:
    """A run is left between two steps, with a lean pass on its way; the next prompt needs all matrices."""
    for stop in range(1, STEPS):
        with streamed(fp8, Placed((), (0,), 2)) as (model, stream):
            of_steps = keep(model, stream, 1)
            for step in range(stop):
                forward(model, of_steps, step, 0)
            feeder, patience = stream._feeder, 200
            while feeder.epoch.ready < 3 * stop + 2 and (patience := patience - 1):
                gc.collect()
            assert worst(run(model, keep(model, stream, 1, seed=1)), expected[1, 1]) == 0


def weights_of(block: nn.Module) -> dict[str, Tensor]:
    return {name: cast(Tensor, module.weight) for name, module in matrix_modules(block).items()}


class Slots:
    """Checks, when the fake GPU comes to it, that what a block computes with is in its slot."""

    def __init__(self, whole: nn.Module, lane: FakeLane) -> None:
        self.truth = [
            {name: weight.view(torch.uint8).clone() for name, weight in weights_of(block).items()}
            for block in cast(nn.ModuleList, whole.blocks)
        ]
        self.lane, self.wrong, self.checked = lane, list[str](), 0

    def step(self, index: int, block: nn.Module, lean: bool) -> None:
        there = {name: weight for name, weight in weights_of(block).items() if not weight.is_meta}
        assert self.truth[index].keys() - there.keys() == (set(OF_TEXT) if lean else set())
        views = {name: weight.view(torch.uint8) for name, weight in there.items()}

        def check() -> None:
            for name, view in views.items():
                if not torch.equal(view, self.truth[index][name]):
                    self.wrong.append(f"block {index} {name}")
            self.checked += 1

        self.lane.compute.put(check)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(("copies", "computation"), [(0.0, 0.003), (0.002, 0.0)])
def test_streams_that_run_later_are_kept_in_order(
    fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch, slots: int, copies: float, computation: float
) -> None:
    lane = FakeLane(copies, computation, seed=slots)
    monkeypatch.setattr(stream_module, "lane_to", lambda device: lane)
    with streamed(fp8, Placed((1,), (2,), slots), chunks=3) as (_, stream):
        slot = Slots(resident(fp8), lane)
        for _ in range(2):
            stream.leave_out(OF_TEXT, after=2)
            for number in range(4):
                for index, block in enumerate(stream):
                    slot.step(index, block, lean=number >= 2 and index != 1)
        lane.compute.drain()
        assert not slot.wrong and slot.checked == 24
    lane.end()


def test_a_disk_that_fails_in_a_lean_pass_is_one_error(
    fp8: Checkpoint, expected: dict[Any, list[Tensor]]
) -> None:
    system = Faults()
    with streamed(fp8, system=system) as (model, stream):
        of_steps = keep(model, stream, 1)
        stream.expect(1)
        assert distance(forward(model, of_steps, 0, 0), expected[1, 0][0]) == 0
        system.fail_after = system.reads + 3
        with pytest.raises(WeightsError, match=r"cannot be read at tensor blocks\.\d\.[a-z0-9_.]+\.weight"):
            forward(model, of_steps, 1, 0)
        system.fail_after = None
        for step in (1, 2, 3):
            assert distance(forward(model, of_steps, step, 0), expected[1, 0][step]) == 0


def test_a_file_that_is_cut_after_the_first_pass_is_one_error(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "transformer", "fp8", "blocks")
    with streamed(checkpoint) as (model, stream):
        of_steps = keep(model, stream, 1)
        stream.expect(1)
        forward(model, of_steps, 0, 0)
        (checkpoint.path / "block_1.safetensors").write_bytes(b"")
        for _ in range(2):
            with pytest.raises(WeightsError, match=r"block_1\.safetensors (ends inside|changed while) "):
                forward(model, of_steps, 1, 0)


# ---------------------------------------------------------------------------- half-way, and all over again


def failing_at(call: int) -> Callable[..., Any]:
    """Cross attention that runs out of memory at its `call`th call."""
    inner, left = CrossAttention.forward, [call]

    def fail(self: CrossAttention, *args: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, *args)

    return fail


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """What may happen between two forwards."""
    placed = st.sampled_from([*PLACEMENTS.values()])
    one = st.one_of(
        st.tuples(st.just("fail"), st.integers(1, 3)),
        st.tuples(st.just("place"), placed),
        st.tuples(st.just("drop"), st.none()),
        st.tuples(st.just("park"), st.none()),
        st.tuples(st.just("other stream"), st.none()),
        st.tuples(st.just("next prompt"), st.integers(1, 2)),
        st.tuples(st.just("go on"), st.none()),
    )
    return draw(st.lists(one, min_size=3, max_size=9))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Of two texts the first is complete and still repeated, before the second has had its turn.
@example(placement=Placed(), texts=2, happening=[("fail", 3), ("park", None), ("drop", None)])
@given(placement=st.sampled_from([*PLACEMENTS.values()]), texts=st.integers(1, 2), happening=changes())
def test_whatever_happens_the_bits_are_the_same(
    fp8: Checkpoint,
    expected: dict[Any, list[Tensor]],
    placement: Placed,
    texts: int,
    happening: list[tuple[str, Any]],
) -> None:
    with streamed(fp8, placement) as (model, stream), pytest.MonkeyPatch.context() as patch:
        of_steps, seed, at = keep(model, stream, texts), 0, 0

        def tell() -> None:  # as `PlannedParts` does
            kept = [condition.kept for condition in of_steps[0] if condition.kept is not None]
            alive = [one for one in kept if not one._dropped]
            if alive:
                whole = len(alive) if any(not one.complete for one in alive) else 0
                stream.leave_out(OF_TEXT, after=whole)
            else:
                stream.leave_out(())

        for what, how in happening:
            if at == STEPS * texts:
                seed, at = 1 - seed, 0
                of_steps = keep(model, stream, texts, seed)
            if what == "fail":
                patch.setattr(CrossAttention, "forward", failing_at(how))
                with pytest.raises(torch.OutOfMemoryError):
                    forward(model, of_steps, *divmod(at, texts))
                patch.undo()
                tell()
            elif what == "place":
                stream.resize(how.resident, how.cached, how.slots)
            elif what == "drop":
                for condition in of_steps[0]:
                    assert condition.kept is not None
                    condition.kept.drop()
                tell()
            elif what == "park":
                stream.park()
            elif what == "other stream":
                stream._feeder.drop_ahead()
            elif what == "next prompt":
                texts, seed, at = how, 1 - seed, 0
                of_steps = keep(model, stream, texts, seed)
            found = forward(model, of_steps, *divmod(at, texts))
            assert distance(found, expected[texts, seed][at]) == 0, (what, at)
            at += 1


def test_memory_is_taken_once_for_each_text_and_given_back(fp8: Checkpoint) -> None:
    whole = resident(fp8)
    assert isinstance(whole, Transformer)
    whole.keep_text = True
    of_steps = conditions_of(whole, 2)
    first, second = (condition.kept for condition in of_steps[0])
    assert first is not None and second is not None and first is not second
    assert all(texts[0].kept is first and texts[1].kept is second for texts in of_steps)
    assert first.nbytes == 0 and not first.complete
    run(whole, of_steps)
    assert first.complete and first.nbytes == second.nbytes == 3 * 2 * 8 * 128 * 2
    room = weakref.ref(cast(Tensor, first._room).untyped_storage())
    first.drop()
    assert room() is None and first.nbytes == 0 and second.nbytes
    velocity = forward(whole, of_steps, 1, 0)
    assert first.nbytes == 0 and torch.isfinite(velocity).all()


def test_a_model_that_is_whole_keeps_nothing_unless_it_is_told(fp8: Checkpoint) -> None:
    whole = resident(fp8)
    assert all(condition.kept is None for texts in conditions_of(whole, 2) for condition in texts)
