"""Streamed blocks give what a loaded model gives, bit for bit, wherever they are and however they come."""

import ctypes
import gc
import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.errors import WeightsError
from runtime.memory import stream as stream_module
from runtime.memory.load import load_part, load_streamed
from runtime.memory.meter import host_peak
from runtime.memory.ring import Ring
from runtime.memory.source import PAGE
from runtime.memory.stored import matrix_modules
from runtime.transformer import Transformer, TransformerConfig
from tests.unit.checkpoint_fixtures import TRANSFORMER, tensors_of
from tests.unit.stream_fixtures import (
    CHUNK,
    FP32,
    FakeLane,
    Faults,
    Placed,
    bare,
    distance,
    inputs_of,
    resident,
    streamed,
    threads_of,
    written,
)

FILES = [
    ("transformer", "fp8", "blocks"),
    ("transformer", "int8", "single"),
    ("transformer", "bf16", "single"),
    ("transformer", "fp32", "blocks"),
    ("transformer", "fp16", "single"),
    ("text_encoder", "fp8", "pickle"),
    ("text_encoder", "int8", "pickle"),
    ("text_encoder", "bf16", "pickle"),
    ("text_encoder", "bf16", "single"),
]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks in per-block files."""
    return written(tmp_path_factory.mktemp("fp8"), "transformer", "fp8", "blocks")


@pytest.fixture(scope="module")
def expected(fp8: Checkpoint) -> Tensor:
    with torch.inference_mode():
        return resident(fp8)(*inputs_of("transformer"))


@torch.inference_mode()
def run(model: nn.Module, kind: str = "transformer", seed: int = 3) -> Tensor:
    return model(*inputs_of(kind, seed))


@pytest.mark.parametrize(("kind", "form", "layout"), FILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_file_gives_what_loading_it_gives(
    tmp_path: Path, kind: Any, form: str, layout: str, dtype: torch.dtype
) -> None:
    checkpoint = written(tmp_path, kind, form, layout)
    whole = resident(checkpoint, dtype)
    with streamed(checkpoint, Placed((1,), (0,), 1), dtype=dtype) as (model, stream):
        worst = max(distance(run(model, kind, seed), run(whole, kind, seed)) for seed in (3, 4, 5))
        print(f"{kind} {form} {layout} as {dtype}: largest difference {worst}")
        assert worst == 0
        own = model.state_dict()  # all that does not stream
        for name, tensor in whole.state_dict().items():
            if name in own:
                assert own[name].dtype == tensor.dtype and torch.equal(own[name].float(), tensor.float()), (
                    name
                )
        gone = set(whole.state_dict()) - set(own) - {"token_embedding.weight"}
        assert gone == {
            f"blocks.{i}.{n}.weight"
            for i, b in enumerate(stream._modules.values())
            for n in matrix_modules(b)
        }  # type: ignore[arg-type]


@st.composite
def placements(draw: st.DrawFn, count: int = 3) -> Placed:
    where = draw(st.lists(st.sampled_from(["resident", "cached", "stored"]), min_size=count, max_size=count))
    of = {word: tuple(i for i, w in enumerate(where) if w == word) for word in ("resident", "cached")}
    least = 0 if len(of["resident"]) == count else 1
    return Placed(of["resident"], of["cached"], draw(st.integers(least, 4)))


@settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    placement=placements(),
    chunk=st.sampled_from([3 * PAGE, CHUNK, 64 * PAGE]),
    chunks=st.integers(1, 6),
    readers=st.integers(1, 6),
    preload=st.booleans(),
    expect=st.sampled_from([None, 0, 1, 3]),
)
def test_every_placement_gives_the_same(
    fp8: Checkpoint,
    expected: Tensor,
    placement: Placed,
    chunk: int,
    chunks: int,
    readers: int,
    preload: bool,
    expect: int | None,
) -> None:
    options = {"chunk": chunk, "chunks": chunks, "readers": readers, "preload": preload}
    with streamed(fp8, placement, **options) as (model, stream):  # type: ignore[arg-type]
        stream.expect(expect)
        for _ in range(3):
            assert distance(run(model), expected) == 0
        counts, size = stream.counts, stream._stored[0].nbytes
        of = len(placement.resident), len(placement.cached)
        assert stream.device_bytes == (of[0] + placement.slots * (of[0] < 3)) * size
        assert stream.cache_bytes == of[1] * size
        assert counts.copied_bytes >= (of[0] + 3 * (3 - of[0])) * stream._stored[0].stored_bytes


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(placements(), st.sampled_from(["run", "leave", "park", "start", "load"])),
        min_size=1,
        max_size=5,
    )
)
def test_every_change_of_placement_gives_the_same(
    fp8: Checkpoint, expected: Tensor, changes: list[Any]
) -> None:
    with streamed(fp8) as (model, stream):
        for placement, then in changes:
            stream.resize(placement.resident, placement.cached, placement.slots)
            if then == "leave":
                next(iter(stream))
            elif then == "park":
                run(model)
                stream.park()
                assert stream.device_bytes == 0
            elif then == "start":
                stream.start()
            elif then == "load":
                stream.load_residents()
            assert distance(run(model), expected) == 0


def test_slots_only_as_many_as_there_are_blocks_to_stream(fp8: Checkpoint) -> None:
    with streamed(fp8, Placed((0, 2), (), 3)) as (_, stream):
        assert stream.device_bytes == (2 + 3) * stream._stored[0].nbytes


class Watched:
    """Checks, when the fake GPU comes to it, that the bytes of a block are in its slot."""

    def __init__(self, stream: Any, whole: nn.Module, compute: Any) -> None:
        self.stream, self.compute = stream, compute
        self.truth = [
            [module.weight.view(torch.uint8).clone() for module in matrix_modules(block).values()]
            for block in whole.blocks  # type: ignore[union-attr]
        ]
        self.wrong: list[str] = []
        self.checked = 0

    def step(self, index: int, block: nn.Module) -> None:
        views = [module.weight.view(torch.uint8) for module in matrix_modules(block).values()]  # type: ignore[operator,union-attr]

        def check() -> None:
            for name, view, truth in zip(matrix_modules(block), views, self.truth[index], strict=True):
                if not torch.equal(view, truth):
                    self.wrong.append(f"block {index} {name}")
            time.sleep(0.0005)
            for name, view, truth in zip(matrix_modules(block), views, self.truth[index], strict=True):
                if not torch.equal(view, truth):
                    self.wrong.append(f"block {index} {name} while it computed")
            self.checked += 1

        self.compute.put(check)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    ("copies", "computation"),
    [(0.0, 0.004), (0.002, 0.0), (0.001, 0.001)],
    ids=["slow compute", "slow copies", "both"],
)
def test_streams_that_run_later_are_kept_in_order(
    fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch, slots: int, copies: float, computation: float
) -> None:
    """On a GPU nothing is done when its call returns; only events keep copies and computation apart."""
    lane = FakeLane(copies, computation, seed=slots)
    monkeypatch.setattr(stream_module, "lane_to", lambda device: lane)
    with streamed(fp8, Placed((1,), (2,), slots), chunks=3) as (_, stream):
        watched = Watched(stream, resident(fp8), lane.compute)
        for number in range(5):
            for index, block in enumerate(stream):
                watched.step(index, block)
                if number == 2 and index == 1:
                    break  # left half way, with copies and computation under way
        stream.resize((), (0,), 1)
        for index, block in enumerate(stream):
            watched.step(index, block)
        lane.compute.drain()
        assert not watched.wrong and watched.checked == 4 * 3 + 2 + 3
    lane.end()


def test_the_test_of_order_would_see_a_missing_wait(fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = FakeLane(0.002, 0.0, seed=1)
    monkeypatch.setattr(lane, "before_compute", lambda copied: None)
    monkeypatch.setattr(stream_module, "lane_to", lambda device: lane)
    with streamed(fp8) as (_, stream):
        watched = Watched(stream, resident(fp8), lane.compute)
        for index, block in enumerate(stream):
            watched.step(index, block)
        lane.compute.drain()
        assert watched.wrong
    lane.end()


def test_an_iteration_that_is_left_half_way_leaves_the_stream_usable(
    fp8: Checkpoint, expected: Tensor
) -> None:
    with streamed(fp8, Placed((1,), (2,), 1)) as (model, stream):
        for stop in (0, 1, 2):
            for index, _ in enumerate(stream):
                if index == stop:
                    break
            assert distance(run(model), expected) == 0
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                raise KeyboardInterrupt
        assert distance(run(model), expected) == 0
        older = iter(stream)
        next(older)
        newer = iter(stream)
        block = next(newer)
        with pytest.raises(RuntimeError, match="iterated anew"):
            next(older)
        older.close()  # type: ignore[attr-defined]
        assert not block.self_attn.q.weight.is_meta  # type: ignore[union-attr]
        assert len(list(newer)) == 2
        assert distance(run(model), expected) == 0


def test_a_block_has_its_matrices_only_while_it_is_due(fp8: Checkpoint, tmp_path: Path) -> None:
    with streamed(fp8, Placed((1,), (), 2)) as (model, stream):
        for index, block in enumerate(stream):
            assert not any(m.weight.is_meta for m in matrix_modules(block).values())  # type: ignore[union-attr]
            others = [b for i, b in enumerate(stream._modules.values()) if i not in (index, 1)]
            assert all(m.weight.is_meta for b in others for m in matrix_modules(b).values())  # type: ignore
        assert all("weight" in name or "bias" in name or "modulation" in name for name in model.state_dict())
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert not any(p.requires_grad for p in model.parameters())
        for form in ("fp8", "int8", "bf16"):
            checkpoint = written(tmp_path / form, "transformer", form, "single")
            with streamed(checkpoint) as (_, other):
                for module in matrix_modules(other[0]).values():
                    with pytest.raises((RuntimeError, IndexError)):  # and never a number
                        module(torch.randn(1, 3, module.in_features, dtype=torch.bfloat16))


def test_the_next_pass_is_fetched_before_it_begins_unless_it_is_the_last(fp8: Checkpoint) -> None:
    def copied_after(expect: int | None, blocks: int) -> float:
        with streamed(fp8, Placed((), (), 2), chunks=2) as (model, stream):
            stream.expect(expect)
            run(model)
            size = stream._stored[0].stored_bytes
            deadline = time.monotonic() + 5
            while stream.counts.copied_bytes < blocks * size and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)  # and no more than that
            return stream.counts.copied_bytes / size

    assert copied_after(1, 3) == 3.0
    assert copied_after(2, 5) == 5.0  # two slots are full with the next pass
    assert copied_after(None, 5) == 5.0


def test_start_fetches_before_the_first_pass(fp8: Checkpoint) -> None:
    with streamed(fp8, Placed((0,), (), 2), preload=False) as (model, stream):
        assert not threads_of(stream) and stream.counts.copied_bytes == 0
        stream.start()
        deadline = time.monotonic() + 5
        while stream.counts.copied_bytes < 3 * stream._stored[0].stored_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        run(model)
        assert stream.counts.waits == 0


def test_cached_blocks_are_read_once(fp8: Checkpoint, expected: Tensor) -> None:
    with streamed(fp8, Placed((0,), (1, 2), 1)) as (model, stream):
        stream.expect(4)
        for _ in range(4):
            assert distance(run(model), expected) == 0
        counts, size = stream.counts, stream._stored[0].stored_bytes
        assert counts.reads.disk_bytes + counts.reads.cached_bytes == 3 * size
        assert counts.cache_bytes == 2 * 3 * size and counts.copied_bytes == (1 + 2 * 4) * size


def test_resident_blocks_report_their_bytes_and_are_read_once(fp8: Checkpoint) -> None:
    seen: list[int] = []
    with streamed(fp8, Placed((0, 1, 2), (), 0), on_bytes=seen.append) as (model, stream):
        assert sum(seen) == fp8.nbytes
        run(model)
        run(model)
        assert stream.counts.copied_bytes == 3 * stream._stored[0].stored_bytes


def test_two_streams_take_turns_with_one_ring(fp8: Checkpoint, expected: Tensor, tmp_path: Path) -> None:
    """The first fills the whole ring for its next pass; the second must not starve."""
    text = written(tmp_path, "text_encoder", "fp8", "pickle")
    ring = Ring(CHUNK, 2, pinned=False)
    whole = run(resident(text), "text_encoder")
    with streamed(fp8, ring=ring) as (model, _), streamed(text, ring=ring) as (encoder, _):
        for _ in range(3):
            assert distance(run(model), expected) == 0
            time.sleep(0.02)  # let it fetch ahead
            assert distance(run(encoder, "text_encoder"), whole) == 0


def test_names_shapes_and_formats_are_as_strict_as_in_loading(tmp_path: Path, fp8: Checkpoint) -> None:
    def refusal(config: TransformerConfig) -> str:
        with torch.device("meta"):
            model = Transformer(config)
        ring = Ring(CHUNK, 2, pinned=False)
        with pytest.raises(WeightsError) as caught:
            load_streamed(model, fp8, placement=Placed(), ring=ring, dtype=torch.bfloat16, device="cpu")
        return str(caught.value)

    assert "30 unknown" in refusal(TRANSFORMER) and "of another format" in refusal(TRANSFORMER)
    assert "missing (blocks.3" in refusal(replace(TRANSFORMER, num_layers=4))
    assert "misshapen" in refusal(replace(TRANSFORMER, ffn_dim=192))


def test_parts_come_later_and_go_again(fp8: Checkpoint, expected: Tensor) -> None:
    children = ("time_embedding", "time_projection", "text_embedding")
    with streamed(fp8, later=children) as (model, _):
        for _ in range(2):
            assert all(p.is_meta for child in children for p in model.get_submodule(child).parameters())
            for names in (children[:1], children[1:]):
                load_part(
                    model, names, fp8, dtype=torch.bfloat16, device="cpu", fp32_parameters=FP32["transformer"]
                )
            assert distance(run(model), expected) == 0
            for child in children:
                model.get_submodule(child).to("meta")


@pytest.mark.parametrize(
    "wrong",
    [
        Placed((0, 0)),
        Placed((0,), (0,)),
        Placed((3,)),
        Placed((), (-1,)),
        Placed((), (), 0),
        Placed((), (), -1),
    ],
)
def test_placements_that_cannot_be_are_refused(fp8: Checkpoint, wrong: Placed) -> None:
    with pytest.raises(ValueError, match=r"placed|slots"), streamed(fp8, wrong):
        pass


def test_matrices_that_a_pth_stores_in_another_order(tmp_path: Path) -> None:
    """A transposed tensor has no offset: it is read whole, for its pieces."""
    state = tensors_of("text_encoder", 2, torch.bfloat16)
    state["token_embedding.weight"] = state["token_embedding.weight"].t().contiguous().t()
    for name in [n for n in state if n.endswith(("q.weight", "fc1.weight"))]:
        state[name] = state[name].t().contiguous().t()
    torch.save(state, tmp_path / "t5.pth")
    checkpoint = open_checkpoint(tmp_path / "t5.pth", "text_encoder")
    assert checkpoint.tensors["blocks.0.attn.q.weight"].offset is None
    whole = run(resident(checkpoint), "text_encoder")
    with streamed(checkpoint, Placed((), (1,), 2), chunk=3 * PAGE) as (model, _):
        for _ in range(2):
            assert distance(run(model, "text_encoder"), whole) == 0


def test_close_ends_it_all_and_may_be_repeated(fp8: Checkpoint) -> None:
    system = Faults()
    with streamed(fp8, Placed((0,), (1,), 1), system=system) as (model, stream):
        run(model)
        threads = threads_of(stream)
        assert len(threads) == 4 and all(thread.is_alive() for thread in threads)
        stream.close()
        stream.close()
        assert not any(thread.is_alive() for thread in threads) and system.open_files == 0
        assert stream.device_bytes == 0 and stream.cache_bytes == 0
        for use in (
            lambda: run(model),
            stream.start,
            stream.load_residents,
            lambda: stream.resize((), (), 1),
        ):
            with pytest.raises(RuntimeError, match="closed"):
                use()


def test_a_stream_that_is_dropped_ends_its_threads(fp8: Checkpoint) -> None:
    before = threading.active_count()
    model = bare(fp8)
    ring = Ring(CHUNK, 2, pinned=False)
    load_streamed(
        model,
        fp8,
        placement=Placed(),
        ring=ring,
        dtype=torch.bfloat16,
        device="cpu",
        fp32_parameters=FP32["transformer"],
    )
    run(model)
    assert threading.active_count() > before
    del model
    gc.collect()
    assert threading.active_count() == before


def test_autograd_and_inference_mode_may_alternate(fp8: Checkpoint, expected: Tensor) -> None:
    """Buffers are written by threads: they must not become tensors that only inference may touch."""
    with torch.inference_mode(), streamed(fp8, Placed((0,), (), 1)) as (model, _):
        assert distance(run(model), expected) == 0
        with torch.inference_mode(False):
            outside = model(*inputs_of("transformer"))
            assert distance(outside.detach(), expected) == 0
        assert distance(run(model), expected) == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_slots_ring_and_cache_and_nothing_else(tmp_path: Path) -> None:
    config = TransformerConfig(768, 3072, num_heads=6, num_layers=6, text_dim=48, text_len=8, freq_dim=32)
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in shapes.items()}
    write_layout(tmp_path / "m", state, Recipe("transformer", "bf16"), "blocks")
    del state
    checkpoint = open_checkpoint(tmp_path / "m", "transformer")
    with torch.device("meta"):
        model = Transformer(config)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier tests have freed hides what this one takes
    ring = Ring(2**20, 4, pinned=False)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    placement = Placed((1,), (3,), 2)
    stream = load_streamed(
        model, checkpoint, placement=placement, ring=ring, dtype=torch.bfloat16, device="cpu"
    )
    for _ in range(2):
        for block in stream:
            for module in matrix_modules(block).values():
                module.weight.view(torch.uint8)[:, 0].sum()  # type: ignore[operator,union-attr]
    grown = host_peak() - before
    small = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    planned = stream.device_bytes + stream.cache_bytes + ring.nbytes + small
    everything, cache = checkpoint.nbytes, stream.cache_bytes
    print(f"grew by {grown / 2**20:.1f} MiB, planned {planned / 2**20:.1f}, all {everything / 2**20:.1f}")
    stream.close()
    assert planned < 0.8 * everything
    mapped = cache + ring.nbytes  # fresh pages for certain; the rest may lie in freed ones
    assert 0.9 * mapped < grown < planned + 12 * 2**20


def test_an_allocation_that_fails_leaves_nothing_and_a_leaner_placement_works(
    fp8: Checkpoint, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(fp8, Placed((), (0,), 1)) as (model, stream):
        run(model)
        lane = stream._feeder.lane
        allocate, made = lane.allocate, []

        def two(nbytes: int) -> tuple[Tensor, Any]:
            if len(made) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            buffer, free = allocate(nbytes)
            made.append(weakref.ref(buffer))
            return buffer, free

        with monkeypatch.context() as patch:
            patch.setattr(lane, "allocate", two)
            with pytest.raises(torch.OutOfMemoryError) as caught:
                stream.resize((0, 1, 2), (), 0)
        assert caught.value is not None and len(made) == 2  # the error is still held here
        assert stream.device_bytes == 0 and all(buffer() is None for buffer in made)
        stream.resize((2,), (0,), 1)
        assert distance(run(model), expected) == 0


def test_what_is_parked_stays_so_until_the_next_pass(
    fp8: Checkpoint, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode that runs out of memory takes plan after plan while the blocks are gone."""
    with streamed(fp8, Placed((0, 1), (2,), 1)) as (model, stream):
        assert distance(run(model), expected) == 0
        stream.park()
        with monkeypatch.context() as patch:

            def none_left(nbytes: int) -> tuple[Tensor, Any]:
                raise torch.OutOfMemoryError("CUDA out of memory")

            patch.setattr(stream._feeder.lane, "allocate", none_left)
            for placement in (Placed((0, 1), (2,), 1), Placed((1,), (), 2), Placed((0,), (1,), 1)):
                stream.resize(placement.resident, placement.cached, placement.slots)
                assert stream.device_bytes == 0
            with pytest.raises(torch.OutOfMemoryError):
                run(model)  # only now
            assert stream.device_bytes == 0
        size = stream._stored[0].nbytes
        assert stream.cache_bytes == size, "block 1's, and no longer that of block 2"
        for _ in range(2):
            assert distance(run(model), expected) == 0
        assert stream.device_bytes == 2 * size  # the last placement's
        with pytest.raises(ValueError, match="expected at least one"):
            stream.park()
            stream.resize((), (), 0)
        stream.close()
        with pytest.raises(RuntimeError, match="closed"):
            stream.resize((), (), 1)


def test_an_error_in_a_block_keeps_no_buffer(fp8: Checkpoint, expected: Tensor) -> None:
    """The error is still held when a leaner placement is made: what it frees must be free."""
    with streamed(fp8, Placed((1,), (), 2)) as (model, stream):
        for stop in (0, 1, 2):
            stream.resize((1,), (), 2)
            homes = [*stream._feeder.slots, *stream._feeder.residents.values()]
            buffers = [weakref.ref(home.buffer) for home in homes]
            del homes
            with pytest.raises(torch.OutOfMemoryError) as caught:
                for index, block in enumerate(stream):
                    assert block is not None
                    if index == stop:
                        raise torch.OutOfMemoryError("CUDA out of memory")
            stream.park()
            assert caught.value is not None and all(buffer() is None for buffer in buffers)
            stream.resize((), (), 1)
            assert distance(run(model), expected) == 0
