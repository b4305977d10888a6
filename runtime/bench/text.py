"""Text states of a prompt of full length: the encoder resident, and its blocks streamed from RAM.

Streamed, no encoder can be faster than its bytes over the bus: that is the reference of the second row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from runtime import loading
from runtime.bench.alone import copy_from_host
from runtime.bench.clock import Run, interleaved, on_device, wall
from runtime.bench.decode import Computing
from runtime.bench.samples import Sample
from runtime.bench.scene import Rows, Scene
from runtime.bench.sizes import Size
from runtime.kernels import launch
from runtime.memory.plan import Blocks
from runtime.memory.stream import BlockStream
from runtime.memory.visit import give_back
from runtime.parts import PlannedParts
from runtime.pipeline import Pipeline
from runtime.text_encoder import TextEncoder
from runtime.ways import FUSED

HOST_COPY_BYTES = 1 << 28
SLOTS = 2


def measure(scene: Scene, size: Size) -> Rows:
    """The rows of the part `text`; `size` is what the pipeline is planned for, no more."""
    pipe = scene.pipe(size)
    ids = _ids(scene, pipe)
    about = f"{ids.shape[1]} tokens"
    row = replace(scene.row("text", "resident"), unit="s", target="text", note=about)
    with _resident(scene, pipe) as encoder:
        runs: dict[str, Run] = {"in use": partial(_encode, encoder, ids, pipe.ways.computing)}
        if pipe.ways.kernels == FUSED:
            runs["reference"] = partial(_encode, encoder, ids, launch.twins)
        with scene.measuring():
            found = interleaved(runs, scene.repeats, scene.device, on_device)
    del encoder, runs
    give_back(scene.where.device)
    yield replace(row, found=found["in use"], reference=found.get("reference"))
    streamed, nbytes = _streamed(scene, pipe, ids)
    note = f"{about}, {nbytes / 1e6:,.1f} MB from RAM"
    row = replace(row, what="streamed from RAM", found=streamed, target="", note=note)
    if scene.device.type == "cpu":  # there is no bus
        yield row
        return
    rate = _bus(scene)
    floor = Sample((nbytes / rate.median,))
    yield replace(row, reference=floor, note=f"{note}; the reference is these bytes over the bus")
    over = streamed.map(lambda seconds: seconds / floor.median)
    yield replace(row, what="streamed over bytes", unit="ratio", found=over, target="text streamed", note="")
    yield replace(row, what="ceiling: pinned RAM to the GPU", unit="B/s", found=rate, note="")


def _ids(scene: Scene, pipe: Pipeline) -> Tensor:
    """Random ids (1, n) of a prompt as long as the model reads."""
    vocabulary = scene.files.text_encoder.sizes()["vocab_size"]
    length = pipe.parts.transformer.config.text_len
    generator = torch.Generator().manual_seed(4)
    return torch.randint(2, vocabulary, (1, length), generator=generator).to(scene.device)


def _encode(encoder: TextEncoder, ids: Tensor, computing: Computing) -> None:
    with computing():
        encoder(ids, torch.ones_like(ids, dtype=torch.bool))


@contextmanager
def _resident(scene: Scene, pipe: Pipeline) -> Iterator[TextEncoder]:
    """The encoder on the device: the plan's own if it stays there, else one that has the blocks leave."""
    if pipe.plan is not None and pipe.plan.text == "resident":
        with pipe.parts.text_encoder() as encoder:
            yield encoder
        return
    parts = pipe.parts
    if isinstance(parts, PlannedParts):
        parts.stream.park()
    where = scene.where
    yield loading.load_text_encoder(scene.files.text_encoder, where.manifest, where.device, scene.dtype)


def _streamed(scene: Scene, pipe: Pipeline, ids: Tensor) -> tuple[Sample, int]:
    """Seconds with every block cached in RAM and none resident, and the bytes that are copied each time."""
    where, parts = scene.where, pipe.parts
    assert isinstance(parts, PlannedParts)  # as `Pipeline.load` makes them
    checkpoint = scene.files.text_encoder
    count = int(checkpoint.sizes()["num_layers"])
    placement = Blocks((), tuple(range(count)), min(SLOTS, count))
    encoder, stream = loading.stream_text_encoder(
        checkpoint, where.manifest, where.device, scene.dtype, placement, parts.ring
    )
    try:
        # The first pass reads the files; each of the others begins with the copy of its first block.
        run = partial(_pass, stream, partial(_encode, encoder, ids, pipe.ways.computing))
        wall(run, scene.device)
        before = stream.counts.copied_bytes
        with scene.measuring():
            found = interleaved({"": run}, scene.repeats, scene.device, warm=0)[""]
        return found, (stream.counts.copied_bytes - before) // scene.repeats
    finally:
        stream.close()
        del encoder
        give_back(where.device)


def _pass(stream: BlockStream, encode: Run) -> None:
    stream.expect(1)
    encode()


def _bus(scene: Scene) -> Sample:
    """Bytes per second from pinned RAM to the GPU."""
    run = copy_from_host(HOST_COPY_BYTES, scene.device)
    seconds = interleaved({"": run}, scene.repeats, scene.device, on_device)[""]
    return seconds.map(lambda value: HOST_COPY_BYTES / value)
