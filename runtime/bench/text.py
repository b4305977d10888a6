"""Text states of a prompt of full length: the encoder resident, and its blocks streamed from RAM.

From RAM that is pinned, as a plan that keeps the encoder there has it from the second prompt on; and from
ordinary RAM, through the pinned ring. Streamed, no encoder can be faster than its bytes over the bus: that is
the reference of these rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from runtime.memory.sizes import KEPT_ROWS
from runtime.memory.stream import BlockStream
from runtime.memory.visit import give_back
from runtime.parts import PlannedParts
from runtime.pipeline import Pipeline
from runtime.text_encoder import TextEncoder
from runtime.ways import FUSED

HOST_COPY_BYTES = 1 << 28
SLOTS = 2


@dataclass(frozen=True)
class Streamed:
    """Seconds with every block in RAM and none on the device: ordinary RAM, and what of it could be `pinned`.

    nbytes: what is copied each time. refusal: why not all of it is pinned.
    """

    nbytes: int
    ordinary: Sample
    pinned: Sample
    pinned_bytes: int
    refusal: str

    @property
    def note(self) -> str:
        """What was pinned."""
        if not self.pinned_bytes:
            return f"nothing could be pinned: {self.refusal}"
        all_of_it = f"{self.pinned_bytes / 1e6:,.1f} MB pinned"
        return f"{all_of_it}, as {self.refusal}" if self.refusal else all_of_it


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
    streamed = _streamed(scene, pipe, ids)
    note = f"{about}, {streamed.nbytes / 1e6:,.1f} MB from RAM"
    row = replace(row, what="streamed from RAM", found=streamed.ordinary, target="", note=note)
    if scene.device.type == "cpu":  # there is no bus, and nothing is pinned
        yield row
        return
    rate = _bus(scene)
    floor = Sample((streamed.nbytes / rate.median,))
    row = replace(row, reference=floor)
    told = f"{note}, {streamed.note}; the reference is these bytes over the bus"
    yield replace(row, what="streamed from pinned RAM", found=streamed.pinned, note=told)
    over = streamed.pinned.map(lambda seconds: seconds / floor.median)
    ratio = replace(row, what="streamed over bytes", reference=None, unit="ratio", found=over)
    yield replace(ratio, target="text streamed", note="from pinned RAM")
    yield replace(row, note=f"{note}, through the ring")
    ceiling = replace(row, what="ceiling: pinned RAM to the GPU", reference=None)
    yield replace(ceiling, unit="B/s", found=rate, note="")


def _ids(scene: Scene, pipe: Pipeline) -> Tensor:
    """Random ids (1, n) of a prompt as long as the model reads."""
    vocabulary = scene.files.text_encoder.sizes()["vocab_size"]
    length = pipe.parts.transformer.config.text_len
    generator = torch.Generator().manual_seed(4)
    return torch.randint(2, vocabulary, (1, length), generator=generator).to(scene.device)


def _encode(encoder: TextEncoder, ids: Tensor, computing: Computing) -> None:
    with computing():
        encoder(ids)


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


def _streamed(scene: Scene, pipe: Pipeline, ids: Tensor) -> Streamed:
    """Every block cached in RAM, none resident: as it is, then pinned as far as that goes."""
    where, parts = scene.where, pipe.parts
    assert isinstance(parts, PlannedParts)  # as `Pipeline.load` makes them
    checkpoint = scene.files.text_encoder
    count = int(checkpoint.sizes()["num_layers"])
    placement = Blocks((), tuple(range(count)), min(SLOTS, count))
    encoder, stream = loading.stream_text_encoder(
        *(checkpoint, where.manifest, where.device, scene.dtype, placement, parts.ring),
        kept_rows=KEPT_ROWS,
        rows_in_ram=True,
    )
    try:
        # The first pass reads the files; each of the others begins with the copy of its first block.
        run = partial(_pass, stream, partial(_encode, encoder, ids, pipe.ways.computing))
        wall(run, scene.device)
        before = stream.counts.copied_bytes
        with scene.measuring():
            ordinary = pinned = interleaved({"": run}, scene.repeats, scene.device, warm=0)[""]
        nbytes = (stream.counts.copied_bytes - before) // scene.repeats
        stream.pin_cached(wait=True)
        if stream.pinned_bytes:
            with scene.measuring():
                pinned = interleaved({"": run}, scene.repeats, scene.device)[""]
        return Streamed(nbytes, ordinary, pinned, stream.pinned_bytes, stream.pin_refusal)
    finally:
        stream.close()
        del encoder
        give_back(where.device)


def _pass(stream: BlockStream, encode: Run) -> None:
    stream.expect(0)  # as in a run: nothing comes before the first block is asked for
    encode()


def _bus(scene: Scene) -> Sample:
    """Bytes per second from pinned RAM to the GPU."""
    run = copy_from_host(HOST_COPY_BYTES, scene.device)
    seconds = interleaved({"": run}, scene.repeats, scene.device, on_device)[""]
    return seconds.map(lambda value: HOST_COPY_BYTES / value)
