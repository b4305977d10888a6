"""Streaming on a card: full-width blocks, two streams of work, no wait of the host, the same bits.

    python -m pytest tests/gpu/test_stream_gpu.py -m gpu -s         # STREAM_TIMELINE=FILE.svg draws a pass

Weights are random, of the true widths, in files below /dev/shm. Needs about 20 GB of GPU memory.
"""

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, load_weights, open_checkpoint
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.layers.kept_text import KeptText
from runtime.layers.rope import rope_table
from runtime.linear import swap_linears
from runtime.memory.load import load_streamed
from runtime.memory.ring import Ring
from runtime.memory.stream import BlockStream
from runtime.memory.trace import Trace, draw_timeline, overlap, seconds_of
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Block, Transformer, TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

CUDA = torch.device("cuda", 0)
LAYERS = 5
WIDE = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=LAYERS)
CHUNK = 32 * 2**20
SHORT, LONG = (1, 4, 8), (21, 30, 52)  # grids of patches: 32 tokens, and 32,760 as in 480x832x81
PASSES = 4


@dataclass(frozen=True)
class Placed:
    """A placement as the plan states it."""

    resident: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    slots: int = 2


PLACEMENTS = {
    "stored": Placed(),
    "cached": Placed((), tuple(range(LAYERS))),
    "mixed": Placed((1,), (0, 4)),
    "one slot": Placed((), (0, 1), 1),
    "three slots": Placed((4,), (), 3),
    "resident": Placed(tuple(range(LAYERS)), (), 0),
}


@pytest.fixture(scope="module", params=["fp8", "int8", "bf16"])
def checkpoint(request: pytest.FixtureRequest) -> Iterator[Checkpoint]:
    """A transformer of LAYERS full-width blocks, in per-block files."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        write_layout(root / "model", noise(WIDE), Recipe("transformer", request.param), "blocks")
        torch.cuda.empty_cache()
        yield open_checkpoint(root / "model", "transformer")
    finally:
        shutil.rmtree(root)
        gc.collect()
        torch.cuda.empty_cache()


def noise(config: Any, seed: int = 1) -> dict[str, Tensor]:
    """Random weights of a scale at which activations stay near one, fp32 on the card."""
    with torch.device("meta"):
        model: nn.Module = (
            Transformer(config) if isinstance(config, TransformerConfig) else TextEncoder(config)
        )
    generator = torch.Generator(CUDA).manual_seed(seed)
    state = {}
    for name, like in model.state_dict().items():
        values = torch.randn(like.shape, generator=generator, device=CUDA)
        if like.ndim > 1 and "modulation" not in name:
            state[name] = values * like[0].numel() ** -0.5
        else:
            state[name] = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return state


def bare(checkpoint: Checkpoint) -> nn.Module:
    with torch.device("meta"):
        model = Transformer(WIDE)
    swap_linears(model, checkpoint.quantized_linears())
    return model


@contextmanager
def streamed(
    checkpoint: Checkpoint,
    placement: Placed,
    chunk: int = CHUNK,
    chunks: int = 10,
    pinned: bool = True,
    readers: int = 3,
) -> Iterator[BlockStream]:
    """The stream of such a model; all memory of the card must be back at the end."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    ring = Ring(chunk, chunks, pinned)
    assert ring.pinned == pinned, ring.description
    model = bare(checkpoint)
    stream = load_streamed(
        model,
        checkpoint,
        placement=placement,
        ring=ring,
        dtype=torch.bfloat16,
        device=CUDA,
        fp32_parameters=Transformer.FP32_PARAMETERS,
        readers=readers,
    )
    small = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held = torch.cuda.memory_allocated() - before
    assert (
        stream.device_bytes
        <= held
        <= stream.device_bytes + 1.05 * small + 2 * 2**20 * (placement.slots + LAYERS)
    )
    try:
        yield stream
    finally:
        stream.close()
        ring.close()
        del stream, model
        gc.collect()
        left = torch.cuda.memory_allocated() - before
        assert left < 64 * 2**20, f"{left} bytes of GPU memory are left after close"  # results, workspaces


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, torch raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Work:
    """What the blocks compute with: tokens of a grid, a time, a text."""

    def __init__(self, grid: tuple[int, int, int], seed: int = 5) -> None:
        generator = torch.Generator(CUDA).manual_seed(seed)
        tokens = grid[0] * grid[1] * grid[2]
        self.x = torch.randn(1, tokens, WIDE.dim, generator=generator, device=CUDA).bfloat16()
        self.time = 0.3 * torch.randn(1, 6, WIDE.dim, generator=generator, device=CUDA)
        self.text = torch.randn(1, 512, WIDE.dim, generator=generator, device=CUDA).bfloat16()
        self.rope = rope_table(grid, WIDE.head_dim, self.x)

    @torch.inference_mode()
    def __call__(self, blocks: Iterable[nn.Module], delay: int = 0, kept: KeptText | None = None) -> Tensor:
        """One pass; `delay` cycles of an idle kernel before each block hold the computation back."""
        x = self.x.clone()
        for number, block in enumerate(blocks):
            if delay:
                torch.cuda._sleep(delay)
            assert isinstance(block, Block)
            make = partial(block.cross_attn.keys_values, self.text)
            text = self.text if kept is None else kept.of(number, make)
            x = block(x, self.time, text, self.rope)
        return x


def seconds(run: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> dict[tuple[int, int, int], Tensor]:
    """What the loaded model gives; also runs every kernel once, so that its trials are over."""
    model = bare(checkpoint)
    load_weights(
        model, checkpoint, dtype=torch.bfloat16, device=CUDA, fp32_parameters=Transformer.FP32_PARAMETERS
    )
    return {grid: Work(grid)(model.blocks) for grid in (SHORT, LONG)}  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("delay", [0, 30_000_000], ids=["fast compute", "slow compute"])
def test_every_placement_gives_the_bits_of_the_loaded_model(
    checkpoint: Checkpoint, expected: dict[Any, Tensor], placement: Placed, delay: int
) -> None:
    work = Work(SHORT)
    with streamed(checkpoint, placement) as stream:
        stream.expect(PASSES)
        with no_waiting():
            results = [work(stream, delay) for _ in range(PASSES)]
        differences = [float((y.double() - expected[SHORT].double()).abs().max()) for y in results]
        print(f"\n{checkpoint.quantization} {placement}: largest differences {differences}, {stream.counts}")
        assert all(torch.equal(y, expected[SHORT]) for y in results) and torch.isfinite(results[0]).all()


@pytest.mark.parametrize(
    ("chunk", "chunks", "pinned", "readers"),
    [(2**20, 1, True, 1), (2**20, 3, True, 6), (CHUNK, 2, False, 2), (256 * 2**20, 2, True, 2)],
)
def test_every_ring_gives_the_same(
    checkpoint: Checkpoint, expected: dict[Any, Tensor], chunk: int, chunks: int, pinned: bool, readers: int
) -> None:
    """Copies that are much slower than the computation, and pageable memory as the last resort."""
    work = Work(SHORT)
    with streamed(checkpoint, Placed((), (2,)), chunk, chunks, pinned, readers) as stream:
        stream.expect(2)
        results = [work(stream) for _ in range(2)]
        assert all(torch.equal(y, expected[SHORT]) for y in results)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("delay", [0, 30_000_000], ids=["fast compute", "slow compute"])
def test_a_text_that_is_kept_gives_the_same_bits_and_moves_less(
    checkpoint: Checkpoint, expected: dict[Any, Tensor], placement: Placed, delay: int
) -> None:
    """Two prompts, one after the other: each brings what makes keys and values in its first pass alone."""
    work = Work(SHORT)
    with streamed(checkpoint, placement) as stream:
        left_out = [m for m in stream._stored[0].matrices if m.owner in Transformer.OF_TEXT]
        less = sum(matrix.nbytes for matrix in left_out)
        streaming, whole = LAYERS - len(placement.resident), stream._stored[0].stored_bytes
        for _ in range(2):
            kept, before = KeptText(LAYERS), stream.counts.copied_bytes
            with torch.inference_mode():
                kept.make_room(work.text, WIDE.num_heads)
            stream.leave_out(Transformer.OF_TEXT, after=1)
            stream.expect(PASSES)
            with no_waiting():
                results = [work(stream, delay, kept) for _ in range(PASSES)]
            copied = stream.counts.copied_bytes - before
            differences = [float((y.double() - expected[SHORT].double()).abs().max()) for y in results]
            print(
                f"\n{checkpoint.quantization} {placement}: largest differences {differences}, {copied} bytes"
            )
            assert all(torch.equal(y, expected[SHORT]) for y in results) and kept.complete
            assert copied == streaming * (PASSES * whole - (PASSES - 1) * less)
            kept.drop()


def test_real_sizes_hide_the_copies(checkpoint: Checkpoint, expected: dict[Any, Tensor]) -> None:
    """32,760 tokens: the same bits, copies behind the computation, no time lost against resident blocks."""
    work = Work(LONG)
    with streamed(checkpoint, PLACEMENTS["cached"]) as stream:
        stream.expect(None)
        work(stream)  # fills the cache
        with no_waiting():
            result = work(stream)
        assert torch.equal(result, expected[LONG])
        del result
        times: dict[str, list[float]] = {"cached": [], "resident": []}
        placed = {"cached": PLACEMENTS["cached"], "resident": PLACEMENTS["resident"]}
        for _ in range(3):
            for name, placement in placed.items():
                stream.resize(placement.resident, placement.cached, placement.slots)
                stream.load_residents()
                work(stream)
                times[name] += [seconds(lambda: work(stream)) for _ in range(2)]
        medians = {name: statistics.median(values) for name, values in times.items()}
        stream.resize((), tuple(range(LAYERS)), 2)
        work(stream)
        work(stream)
        stream.trace = trace = Trace(CUDA)
        work(stream)
        work(stream)
        stream.trace = None
        spans = trace.spans()
    hidden, ratio = overlap(spans), medians["cached"] / medians["resident"]
    print(f"\n{checkpoint.quantization}: {LAYERS} blocks {medians}, ratio {ratio:.4f}, hidden {hidden:.4f}")
    print(f"copying {seconds_of(spans, 'copy'):.3f} s of {spans[-1].end:.3f}; {stream.counts}")
    if "STREAM_TIMELINE" in os.environ and checkpoint.quantization == "fp8":
        Path(os.environ["STREAM_TIMELINE"]).write_text(draw_timeline(spans, "Blocks streamed from RAM"))
    assert hidden > 0.95
    assert ratio < 1.05


def test_the_speed_of_copies(checkpoint: Checkpoint) -> None:
    """Bytes a second to the card, from cached blocks, with next to no computation: printed."""
    work = Work(SHORT)
    with streamed(checkpoint, PLACEMENTS["cached"]) as stream:
        work(stream)
        stream.trace = trace = Trace(CUDA)
        before = stream.counts.copied_bytes
        took = seconds(lambda: [work(stream) for _ in range(6)])
        copied = stream.counts.copied_bytes - before
        stream.trace = None
        spans = trace.spans()
    busy = seconds_of(spans, "copy")
    read = seconds_of(spans, "read")
    print(
        f"\n{checkpoint.quantization}: {copied / took / 1e9:.1f} GB/s in all, "
        f"{copied / busy / 1e9:.1f} while a copy ran ({busy:.3f} of {took:.3f} s), "
        f"{copied / read / 1e9:.1f} while RAM was read ({read:.3f} s)"
    )
    assert copied / took > 5e9


def test_pinned_blocks_give_the_same_bits_and_never_hold_up_the_host(
    checkpoint: Checkpoint, expected: dict[Any, Tensor]
) -> None:
    """Copies straight from the cache: planned bytes are pinned, nothing waits, all is unpinned in the end."""
    work = Work(SHORT)
    with streamed(checkpoint, PLACEMENTS["cached"]) as stream:
        stream.expect(1)
        assert torch.equal(work(stream), expected[SHORT])
        began = time.perf_counter()
        stream.pin_cached(wait=True)
        took, block = time.perf_counter() - began, stream._stored[0].nbytes
        print(f"\n{checkpoint.quantization}: {stream.pinned_bytes / 1e9:.2f} GB pinned in {took:.2f} s")
        assert stream.pinned_bytes == stream.cache_bytes == LAYERS * block, stream.pin_refusal
        parts = {i: stream._reader.in_place(i, stream._feeder._pieces[i][-1]) or () for i in (0, 1)}
        assert all(part.is_pinned() for several in parts.values() for part in several)
        stream.expect(PASSES)
        before = stream.counts
        with no_waiting():
            results = [work(stream, delay) for delay in (0, 30_000_000) * (PASSES // 2)]
        after = stream.counts
        assert all(torch.equal(y, expected[SHORT]) for y in results)
        assert after.reads == before.reads
        assert after.copied_bytes - before.copied_bytes == PASSES * LAYERS * stream._stored[0].stored_bytes
        stream.expect(2)
        work(stream)
        torch.cuda.synchronize()
        began = time.perf_counter()
        work(stream, delay=200_000_000)  # a tenth of a second a block
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
        print(f"the host enqueued a pass in {host:.3f} s that took the GPU {whole:.3f} s")
        assert whole > 0.3 and host < whole / 4  # a copy that the driver stages would wait for its slot
        stream.expect(2)
        work(stream, delay=30_000_000)
        stream.resize((), (1, 2), 2)  # with work under way
        assert not any(part.is_pinned() for part in parts[0]) and all(part.is_pinned() for part in parts[1])
        assert stream.pinned_bytes == stream.cache_bytes == 2 * block
        assert torch.equal(work(stream), expected[SHORT])
    assert not any(part.is_pinned() for several in parts.values() for part in several)


def test_the_speed_of_copies_from_pinned_blocks(checkpoint: Checkpoint) -> None:
    """Bytes a second to the card with next to no computation, beside one plain copy: printed."""
    work = Work(SHORT)
    with streamed(checkpoint, PLACEMENTS["cached"]) as stream:
        stream.expect(1)
        work(stream)
        stream.pin_cached(wait=True)
        stream.expect(7)
        work(stream)
        before = stream.counts.copied_bytes
        took = seconds(lambda: [work(stream) for _ in range(6)])
        copied = stream.counts.copied_bytes - before
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=CUDA)
    bus = source.nbytes / min(seconds(lambda: target.copy_(source, non_blocking=True)) for _ in range(5))
    print(
        f"\n{checkpoint.quantization}: {copied / took / 1e9:.1f} GB/s in all, the bus gives {bus / 1e9:.1f}"
    )
    assert copied / took > bus / 1.5


def test_a_pass_that_is_left_and_a_change_of_placement_with_work_under_way(
    checkpoint: Checkpoint, expected: dict[Any, Tensor]
) -> None:
    work = Work(SHORT)
    with streamed(checkpoint, Placed((1,), (0,), 2)) as stream:
        for stop in range(3):
            x = work.x.clone()
            with torch.inference_mode():
                for index, block in enumerate(stream):
                    torch.cuda._sleep(50_000_000)
                    x = block(x, work.time, work.text, work.rope)
                    if index == stop:
                        break
            assert torch.equal(work(stream), expected[SHORT])
        for placement in (*PLACEMENTS.values(), Placed((2,), (), 1)):
            work(stream, delay=20_000_000)
            stream.resize(placement.resident, placement.cached, placement.slots)
            assert torch.equal(work(stream), expected[SHORT])
        before = torch.cuda.memory_allocated()
        held = stream.device_bytes
        stream.park()
        freed = before - torch.cuda.memory_allocated()
        print(f"\nparked: {freed} bytes freed of {held}")
        assert stream.device_bytes == 0 and freed >= held
        assert torch.equal(work(stream), expected[SHORT])


def test_too_little_memory_leaves_a_stream_that_a_leaner_plan_can_use(
    checkpoint: Checkpoint, expected: dict[Any, Tensor]
) -> None:
    work = Work(SHORT)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    with streamed(checkpoint, Placed((), (), 1)) as stream:
        work(stream)
        torch.cuda.synchronize()
        room = torch.cuda.memory_reserved() + 2.5 * stream.device_bytes
        torch.cuda.set_per_process_memory_fraction(room / total, CUDA)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                stream.resize(tuple(range(LAYERS)), (), 0)
            assert stream.device_bytes == 0
            stream.resize((), (0,), 2)
            assert torch.equal(work(stream), expected[SHORT])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def test_the_ring_is_pinned_and_gives_back() -> None:
    ring = Ring(CHUNK, 4, pinned=True)
    chunk = ring.acquire(lambda: False)
    assert ring.pinned and chunk is not None and chunk.bytes.is_pinned()
    view = chunk.bytes
    ring.close()
    assert not view.is_pinned()
    probe = torch.ones(1000, device=CUDA)  # no error is left behind for the next kernel
    assert float(probe.sum()) == 1000


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_a_streamed_text_encoder(form: Any) -> None:
    config = TextEncoderConfig(2000, 4096, 4096, 10240, 64, 4)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        file = Path(root) / "model_t5.pth"
        write_layout(file, noise(config, seed=2), Recipe("text_encoder", form), "pickle")
        checkpoint = open_checkpoint(file, "text_encoder")

        def model_on_meta() -> nn.Module:
            with torch.device("meta"):
                model = TextEncoder(config)
            swap_linears(model, checkpoint.quantized_linears())
            return model

        whole = model_on_meta()
        load_weights(whole, checkpoint, dtype=torch.bfloat16, device=CUDA)
        model = model_on_meta()
        ring = Ring(CHUNK, 8, pinned=True)
        stream = load_streamed(
            model, checkpoint, placement=Placed(), ring=ring, dtype=torch.bfloat16, device=CUDA
        )
        with torch.inference_mode(), stream:
            stream.expect(3)
            for length in (3, 77, 512):
                ids = torch.randint(0, 2000, (1, length), device=CUDA)
                mask = torch.ones_like(ids, dtype=torch.bool)
                ours, theirs = model(ids, mask), whole(ids, mask)
                print(f"\ntext encoder {form} {length}: difference {float((ours - theirs).abs().max())}")
                assert torch.equal(ours, theirs)
        ring.close()
