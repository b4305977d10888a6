"""One denoise forward: in the way in use and by the reference; where its time goes; the machine's ceilings.

Where the time goes is told twice. Alone: every operation by itself, at the shapes and as often as the forward
asks for it; what is left of the forward is everything else. By the profiler: the kernels of one forward, told
apart by their names, without what the guard adds. The ceilings are measured in the same minute, so that a
slower card still tells.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.bench import alone
from runtime.bench.busy import Busy, Kernel, busy
from runtime.bench.clock import Run, interleaved, queued, wait, wall
from runtime.bench.following import following, plain
from runtime.bench.picture import FORWARD, REFERENCE, UNGUARDED
from runtime.bench.samples import Sample, of_sum
from runtime.bench.scene import Rows, Scene, condition_of, placed, warm_forward
from runtime.bench.sizes import Mix, Product, Size, Work
from runtime.pipeline import Pipeline
from runtime.transformer import Condition
from runtime.ways import Ways

COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}
"""Of the copy that shows the memory's speed: several times any cache."""


@dataclass(frozen=True)
class _Forward:
    """A forward that can be run again and again."""

    scene: Scene
    pipe: Pipeline
    size: Size
    latents: Tensor
    condition: Condition
    way: Ways

    def run(self, way: Ways, guarded: bool = True) -> None:
        """Once, in this way."""
        parts = self.pipe.parts
        parts.expect(1)
        with following(parts.transformer, way, guarded=guarded), torch.inference_mode():
            parts.transformer.velocity(self.latents, self.condition)

    @property
    def blocks(self) -> int:
        """Of the transformer."""
        return len(list(self.pipe.parts.transformer.blocks.children()))


def measure(scene: Scene, size: Size) -> Rows:
    """The rows of the part `forward` for one size."""
    began = time.perf_counter()
    forward = _prepare(scene, size)
    took = Sample((time.perf_counter() - began,))
    work = _record(forward)  # also the warm-up of the forward without the guard
    runs: dict[str, Run] = {
        "in use": partial(forward.run, forward.way),
        "unguarded": partial(forward.run, forward.way, guarded=False),
    }
    reference = plain(scene.device)
    if forward.way.as_dict() != reference.as_dict():
        runs["reference"] = partial(forward.run, reference, guarded=False)
        wall(runs["reference"], scene.device)
    with scene.measuring():
        found = interleaved(runs, scene.repeats, scene.device, warm=0)
    row = replace(scene.row("forward", FORWARD, size), unit="s", target="forward")
    whole = found["in use"]
    about = "" if "reference" in found else "; this is the reference itself"
    note = f"{forward.way}, cross {forward.way.on_text}; {placed(forward.pipe)}{about}"
    yield replace(row, found=whole, reference=found.get("reference"), note=note)
    yield replace(row, what=UNGUARDED, found=found["unguarded"], target="")
    note = "weights, choice of the way, kernels compiled: none of the others has it"
    row = replace(scene.row("forward", "loading and first forward", size), unit="s")
    yield replace(row, found=took, note=note)
    yield from _alone(forward, work, whole)
    yield from _profiled(forward)
    if "reference" in found:
        yield from _profiled(forward, reference)
    yield from _ceilings(forward, work)


def _prepare(scene: Scene, size: Size) -> _Forward:
    pipe = scene.pipe(size)
    latents, condition = scene.latents(size), condition_of(pipe, scene.device, scene.dtype)
    warm_forward(pipe, latents, condition)
    return _Forward(scene, pipe, size, latents, condition, pipe.ways)


def _record(forward: _Forward) -> Work:
    """What one forward asks for, without what the guard adds."""
    parts = forward.pipe.parts
    parts.expect(1)
    model = parts.transformer
    bare = following(model, forward.way, guarded=False)
    with bare, alone.recording(model) as work, torch.inference_mode():
        model.velocity(forward.latents, forward.condition)
    wait(forward.scene.device)
    return work


# --- alone ---


def _alone(forward: _Forward, work: Work, whole: Sample) -> Rows:
    """Self attention, cross attention and products, each alone, and what they leave of the forward."""
    scene, way = forward.scene, forward.way
    block = next(forward.pipe.parts.transformer.blocks.children())
    like = alone.linears(block)[0]

    def attention(name: str) -> Callable[[Mix], Run]:
        return lambda one: alone.mix(one, name, scene.dtype, scene.device)

    kinds: dict[str, tuple[Counter[Any], Callable[[Any], Run]]] = {
        "self attention": (work.of_tokens, attention(way.name)),
        "cross attention": (work.on_text, attention(way.on_text)),
        "products": (work.products, lambda one: alone.product(one, like, scene.dtype, scene.device)),
    }
    total = 0.0
    for what, (counts, make) in kinds.items():
        found = _timed(scene, counts, make)
        total += found.median
        share = f"{found.median / whole.median:.0%} of the forward, {counts.total()} of them"
        row = scene.row("forward", f"alone: {what}", forward.size)
        yield replace(row, unit="s", found=found, note=share)
    rest = whole.map(lambda seconds: seconds - total)
    row = scene.row("forward", "alone: everything else", forward.size)
    note = f"the forward less the three above; {work.words()}"
    yield replace(row, unit="s", found=rest, note=note)


def _timed(scene: Scene, counts: Mapping[Product | Mix, int], make: Callable[[Any], Run]) -> Sample:
    """Seconds of all that is counted, one kind of operation in memory at a time."""
    samples = {
        str(one): interleaved({"": make(one)}, scene.repeats, scene.device, queued)[""] for one in counts
    }
    return of_sum(samples, {str(one): times for one, times in counts.items()})


# --- by the profiler ---


def _profiled(forward: _Forward, reference: Ways | None = None) -> Rows:
    """The kernels of one forward, in the way in use or by the reference; on a GPU alone."""
    if forward.scene.device.type != "cuda":
        return
    run = partial(forward.run, reference or forward.way, guarded=False)
    found = busy(kernels_of(run, forward.scene.device), forward.blocks)
    apart = {
        "attention": found.attention if found.of_tokens is None else None,
        "self attention": found.of_tokens,
        "cross attention": found.on_text,
        "products": found.products,
        "everything else": found.other,
    }
    for what, seconds in apart.items():
        if seconds is not None:
            whose = "" if reference is None else REFERENCE
            row = forward.scene.row("forward", f"{whose}profiled: {what}", forward.size)
            target = "forward other" if what == "everything else" and reference is None else ""
            note = _top(found) if what == "everything else" else ""
            yield replace(row, unit="s", found=Sample((seconds,)), target=target, note=note)


def kernels_of(run: Run, device: torch.device) -> list[Kernel]:
    """Every kernel that `run` had the GPU do, copies and fills too; what it compiles is there already."""
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    # With `acc_events`, or torch warns that it keeps those of the last cycle alone: there is one.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run()
        wait(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    # Ranges that a program named are no kernels, though the profiler lists them among them.
    named = ("ProfilerStep", "gpu_user_annotation")
    return [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in seen.events() or ()
        if event.device_type == on_gpu and not event.name.startswith(named)
    ]


def _top(found: Busy) -> str:
    rest = [one for one in found.top if Kernel(one[0], 0, 0).kind == "other"]
    shown = ", ".join(f"{name[:40]} {seconds * 1e3:.1f} ms in {runs}" for name, runs, seconds in rest[:3])
    return f"{found.kernels} kernels; of the rest the most: {shown}" if shown else f"{found.kernels} kernels"


# --- ceilings ---


def _ceilings(forward: _Forward, work: Work) -> Rows:
    """The rates of the largest product, of attention and of a copy, alone, on this card at this moment."""
    scene, size = forward.scene, forward.size
    block = next(forward.pipe.parts.transformer.blocks.children())
    like = alone.linears(block)[0]
    mix = max(work.of_tokens, key=lambda one: one.operations)
    largest = replace(work.largest, rows=mix.tokens)
    nbytes = COPY_BYTES[scene.device.type]
    makes: dict[str, tuple[Callable[[], Run], int, str]] = {
        "product": (
            lambda: alone.product(largest, like, scene.dtype, scene.device),
            largest.operations,
            f"{largest.rows} x {largest.depth} -> {largest.columns}",
        ),
        "self attention": (
            lambda: alone.mix(mix, forward.way.name, scene.dtype, scene.device),
            mix.operations,
            f"{forward.way.name}, {mix.tokens} tokens, {mix.heads} heads of {mix.width}",
        ),
        "copy": (
            lambda: alone.copy(nbytes, scene.device),
            2 * nbytes,
            f"{nbytes >> 20} MiB, read and written",
        ),
    }
    for what, (make, amount, note) in makes.items():
        seconds = interleaved({"": make()}, scene.repeats, scene.device, queued)[""]
        row = scene.row("forward", f"ceiling: {what}", size)
        rate = seconds.map(partial(_per_second, amount))
        yield replace(row, unit="B/s" if what == "copy" else "FLOP/s", found=rate, note=note)


def _per_second(amount: int, seconds: float) -> float:
    return amount / seconds
