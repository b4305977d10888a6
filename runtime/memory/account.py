"""What a choice of placement takes: bytes per phase and part, host memory, seconds. Formulas are in `costs`.

The words of a plan are here too: the job, the budget, the ring, and `Choice`, the decisions that everything
else follows from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from runtime.layers.tiles import Rung
from runtime.memory import costs
from runtime.memory.costs import MIB, Geometry
from runtime.memory.decode_costs import H200_BF16, decode_bytes, decode_time_factor, decode_workspace
from runtime.memory.sizes import ModelSizes, decoder_parameters
from runtime.memory.speeds import Speeds

SHORT_SLICES = (2048, 1024, 512)
"""Tokens in a slice where memory is short; else `costs.usual_slice`, which is the same for every placement,
so that latents are the same too."""

SLOTS = 2
"""One block computes while the next one is copied."""

CHUNK = 32 * MIB
CHUNKS = 11
"""369 MB in all: pinning more than 400 MB at once fails under WSL2 (field-notes 3d, 26)."""
FEW_CHUNKS = (6, 3)
"""Shorter rings, where RAM or what can be pinned is short; the first serves where nothing is pinned."""

Device = Literal["cuda", "cpu"]
Text = Literal["resident", "cached", "streamed", "known"]
"""Where the text encoder is: on the GPU for good; its blocks in RAM, once a prompt has needed them, or read
from their file for each prompt, and on the GPU for that phase alone; nowhere, as the states are known."""
Limit = Literal["compute", "disk", "PCIe", "RAM"]
Parts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Job:
    """One video: pixels, frames, denoise steps, forwards of a step (2 with guidance).

    encode_text: False when the text states are known already.
    """

    height: int
    width: int
    frames: int
    steps: int = 4
    forwards: int = 1
    encode_text: bool = True

    @property
    def video(self) -> Geometry:
        """The video's sizes."""
        return Geometry(self.height, self.width, self.frames)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class Budget:
    """What may be used, bytes. vram: that torch may reserve, 0 to compute on the CPU. ram: that this
    process may grow to. pinned: of the ring. The `_source`s say where the numbers come from, for people.
    """

    vram: int
    ram: int
    pinned: int
    vram_source: str = ""
    ram_source: str = ""
    pinned_source: str = ""


@dataclass(frozen=True)
class Wish:
    """What the profile would like to stay on the GPU for the next video, if all fits together.

    text_stays: else in RAM, if that has room when all else has its own. alternatives: other variants of the
    model, name -> sizes, for the advice when nothing fits. attention: the 8-bit backend that works here, if
    one does: it is faster and needs more memory.
    """

    text_stays: bool = False
    vae_stays: bool = False
    attention: str = ""
    alternatives: Mapping[str, ModelSizes] = field(default_factory=dict)


@dataclass(frozen=True)
class Ring:
    """The staging memory: `chunks` chunks of `chunk_bytes`."""

    chunk_bytes: int
    chunks: int
    pinned: bool

    @property
    def nbytes(self) -> int:
        """Of all chunks."""
        return self.chunk_bytes * self.chunks


@dataclass(frozen=True)
class Estimate:
    """A predicted time, and what sets it."""

    seconds: float
    limit: Limit


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from."""

    sizes: ModelSizes
    job: Job
    budget: Budget
    speeds: Speeds

    @property
    def device(self) -> Device:
        """Where the models compute."""
        return "cuda" if self.budget.vram else "cpu"

    @property
    def fused(self) -> bool:
        """Whether fused kernels do what lies between the products."""
        return self.speeds.fused and self.device == "cuda"


@dataclass(frozen=True)
class Choice:
    """The decisions from which the rest of a plan follows. resident, cached: how many blocks.

    release: the blocks' buffers leave before the decode. text_kv: the keys and values of the text stay from
    its first forward on, and what makes them does not come again; they leave before the decode. attention:
    the 8-bit backend of tokens among each other; empty: one in 16 bits.
    """

    ring: Ring
    text: Text
    resident: int
    cached: int
    slots: int
    token_slice: int | None
    rung: Rung
    vae_stays: bool = False
    release: bool = True
    text_kv: bool = False
    attention: str = ""


# ---------------------------------------------------------------------------------------------------- memory


def device_parts(inputs: Inputs, choice: Choice) -> Parts:
    """phase -> part -> bytes in the memory that computes: the GPU's, on the CPU the machine's.

    The blocks' buffers are there from loading on; with all blocks resident the transformer's embeddings stay
    too. Before the decode the buffers leave if `choice.release`; what is small stays.
    """
    sizes, job, cpu = inputs.sizes, inputs.job, inputs.device == "cpu"
    buffers = {
        "resident blocks": choice.resident * sizes.blocks.matrices,
        "slots": choice.slots * sizes.blocks.matrices,
    }
    small = {"small tensors": sizes.blocks.small + sizes.ends}
    stays = {} if choice.slots else {"embeddings": sizes.entry}
    encoder = {}
    if choice.text == "resident":
        whole = sizes.text.count * sizes.text.matrices + sizes.text.small + sizes.token_rows
        encoder = {"text encoder": whole}
    # On the CPU a model at rest lies where it computes.
    vae = {"VAE": vae_bytes(sizes)} if choice.vae_stays or cpu else {}
    there = buffers | small | vae | encoder

    phases: Parts = {}
    if choice.text != "known":
        visiting = min(SLOTS, sizes.text.count) * sizes.text.matrices + sizes.text.small
        texts = {"text encoder": visiting} | encoder | {"activations": costs.text_activations(sizes)}
        phases["text"] = there | texts
    entry = costs.entry_activations(sizes, job.steps, job.forwards)
    phases["entry"] = there | {"embeddings": sizes.entry, "activations": entry}
    activations = costs.activations(
        sizes, job.video, choice.token_slice, job.forwards, inputs.fused, choice.attention
    )
    kept = {"text keys and values": costs.text_keys_values(sizes, job.forwards)} if choice.text_kv else {}
    phases["denoise"] = there | stays | kept | {"activations": activations}
    decode = {"VAE and frames": decoding(inputs, choice.rung)}
    phases["decode"] = ({} if choice.release else buffers) | small | stays | encoder | decode
    for parts in phases.values():
        parts["reserve"] = 0 if cpu else costs.reserved(sum(parts.values()))
    return {phase: {name: n for name, n in parts.items() if n} for phase, parts in phases.items()}


def text_cache(sizes: ModelSizes, choice: Choice) -> int:
    """RAM of a text encoder whose blocks stay there; its table of tokens stays in its file."""
    return sizes.text.count * sizes.text.matrices if choice.text == "cached" else 0


def vae_bytes(sizes: ModelSizes) -> int:
    """The VAE's decoder as it lies in memory."""
    return decoder_parameters(sizes.vae_base_dim) * sizes.vae_itemsize


def decoding(inputs: Inputs, rung: Rung) -> int:
    """Most bytes of a decode on `rung`, the decoder's weights included, and on a GPU the kernels'
    workspace.
    """
    job, sizes = inputs.job, inputs.sizes
    live = _decode_bytes(rung, job.height, job.width, job.frames, sizes.vae_base_dim, sizes.vae_itemsize)
    return live + (decode_workspace(live) if inputs.device == "cuda" else 0)


def decode_slowdown(inputs: Inputs, rung: Rung) -> float:
    """Time of a decode on `rung` over that of the whole picture at once."""
    job, speed = inputs.job, inputs.speeds.bf16 / H200_BF16
    return _decode_time_factor(rung, job.height, job.width, speed)


# A plan is found by trying, and these two walk through the decoder's layers each time.
_decode_bytes = lru_cache(maxsize=512)(decode_bytes)
_decode_time_factor = lru_cache(maxsize=512)(decode_time_factor)


def host_bytes(inputs: Inputs, choice: Choice, parts: Parts) -> dict[str, int]:
    """phase -> resident RAM: the process, the ring, the cache, the VAE at rest, the frames; on the CPU all
    parts.

    What is loaded whole goes through RAM tensor by tensor, to a GPU piece by piece. The cache fills while
    denoising and stays until the end, that of the text encoder while the prompt is encoded; the decode ends
    with all frames in RAM.
    """
    sizes, cuda = inputs.sizes, inputs.device == "cuda"
    base = (costs.PROCESS_CUDA if cuda else costs.PROCESS_CPU) + costs.HOST_SLACK + choice.ring.nbytes
    if cuda and not choice.vae_stays:
        base += vae_bytes(sizes)
    base += text_cache(sizes, choice) + (sizes.token_rows if choice.text == "cached" else 0)
    cache = choice.cached * sizes.blocks.matrices
    host = {}
    for phase, there in parts.items():
        host[phase] = base + (0 if cuda else sum(there.values()))
        if cuda and (phase == "entry" or (phase == "text" and choice.text == "resident")):
            host[phase] += costs.STAGED
        elif phase == "entry":
            host[phase] += sizes.entry_host
        host[phase] += cache if phase in ("denoise", "decode") else 0
        if phase == "decode":
            host[phase] += costs.host_frames(inputs.job.video) + (costs.DECODE_HOST if cuda else 0)
    return host


# ------------------------------------------------------------------------------------------------------ time


def times(inputs: Inputs, choice: Choice) -> tuple[int, dict[str, Estimate]]:
    """Bytes read from disk for one video, and phase -> its time."""
    sizes, job, speeds = inputs.sizes, inputs.job, inputs.speeds
    blocks, cuda = sizes.blocks, inputs.device == "cuda"
    stored = blocks.count - choice.resident - choice.cached

    seconds: dict[str, Estimate] = {}
    start = costs.START_SECONDS if cuda else costs.START_CPU_SECONDS
    disk = sizes.rest
    read = disk / speeds.disk
    seconds["load"] = Estimate(start + read, "disk" if read > start else "compute")
    if choice.text != "known":
        # Every prompt reads a streaming encoder anew.
        disk += (job.forwards if choice.text == "streamed" else 1) * sizes.text.count * sizes.text.stored
        seconds["text"] = text_time(inputs, choice)

    whole, lean = later_passes(inputs, choice)
    disk += blocks.stored * (blocks.count + whole * stored)
    disk += (blocks.stored - blocks.text_stored) * lean * stored
    seconds["denoise"] = denoise_time(inputs, choice)
    slowdown = decode_slowdown(inputs, choice.rung)
    seconds["decode"] = Estimate(costs.decode_seconds(sizes, job.video, speeds, slowdown), "compute")
    encoding = costs.MP4_SECONDS * job.video.pixels  # most of it beside the decode
    left = max(costs.MP4_LEFT * encoding, encoding - seconds["decode"].seconds)
    seconds["mp4"] = Estimate(left, "compute")
    return disk, seconds


def text_time(inputs: Inputs, choice: Choice) -> Estimate:
    """All prompts of one video, of which the first is read from the disk. The next ones are not where the
    encoder stays: from RAM they take the ring's way, as it is pinned only beside the first denoise steps.
    """
    sizes, speeds, more = inputs.sizes.text, inputs.speeds, inputs.job.forwards - 1
    computing = costs.text_seconds(inputs.sizes, speeds)
    stored, cached = sizes.count * sizes.stored, sizes.count * sizes.matrices
    first, next_ = {"compute": computing, "disk": stored / speeds.disk}, {"compute": computing}
    if inputs.device == "cuda":
        bus = speeds.copied_to_gpu(choice.ring.pinned)
        first["PCIe"] = stored / bus
        if choice.text == "cached":
            next_ |= {"PCIe": cached / bus, "RAM": cached / speeds.ram_copy}
    if choice.text == "streamed":
        next_ = first
    if choice.text == "resident":  # what is loaded at once need not be there before the next prompt begins
        return _longest(first | {"compute": (1 + more) * computing})
    total = {term: first.get(term, 0.0) + more * next_.get(term, 0.0) for term in first | next_}
    return Estimate(max(first.values()) + more * max(next_.values()), _longest(total).limit)


def later_passes(inputs: Inputs, choice: Choice) -> tuple[int, int]:
    """Passes over the blocks after the first: with all matrices, and without what makes the text's keys and
    values. The first forward of each text needs those too.
    """
    job = inputs.job
    passes = job.steps * job.forwards
    lean = passes - job.forwards if choice.text_kv else 0
    return passes - 1 - lean, lean


def denoise_time(inputs: Inputs, choice: Choice) -> Estimate:
    """All steps. The first pass reads every block, wherever it will lie; residents come in their turn."""
    count = inputs.sizes.blocks.count
    streamed = count - choice.resident
    stored = streamed - choice.cached
    whole, lean = later_passes(inputs, choice)
    kinds = (
        (1, pass_seconds(inputs, choice, stored=count, cached=0, copied=count)),
        (whole, pass_seconds(inputs, choice, stored=stored, cached=choice.cached, copied=streamed)),
        (lean, pass_seconds(inputs, choice, stored=stored, cached=choice.cached, copied=streamed, lean=True)),
    )
    total = {term: sum(times * terms[term] for times, terms in kinds) for term in kinds[0][1]}
    # With one slot nothing overlaps.
    lone = choice.slots == 1 and streamed > 1
    seconds = sum(times * (sum(terms.values()) if lone else max(terms.values())) for times, terms in kinds)
    return Estimate(seconds, _longest(total).limit)


def moved(inputs: Inputs, choice: Choice) -> int:
    """Bytes of matrices that come to the device in the passes after the first."""
    blocks = inputs.sizes.blocks
    whole, lean = later_passes(inputs, choice)
    each = whole * blocks.matrices + lean * (blocks.matrices - blocks.text_matrices)
    return (blocks.count - choice.resident) * each


def pass_seconds(
    inputs: Inputs, choice: Choice, *, stored: int, cached: int, copied: int, lean: bool = False
) -> dict[str, float]:
    """Seconds of each term of one pass over all blocks; they overlap, so the longest is the pass.

    stored, cached, copied: blocks that are read from disk, taken from the cache, copied to the GPU; `lean`:
    without what makes the text's keys and values. The few milliseconds of making them count in every pass, so
    that nothing is taken off the GPU for their sake.
    """
    blocks, speeds = inputs.sizes.blocks, inputs.speeds
    read, brought = blocks.stored, blocks.matrices
    if lean:
        read, brought = read - blocks.text_stored, brought - blocks.text_matrices
    terms = {
        "compute": costs.forward_seconds(inputs.sizes, inputs.job.video, speeds, choice.attention),
        "disk": stored * read / speeds.disk,
        "RAM": cached * brought / speeds.ram_copy,
    }
    if inputs.device == "cuda":
        terms["PCIe"] = copied * brought / speeds.copied_to_gpu(choice.ring.pinned)
    return terms


def _longest(terms: Mapping[str, float]) -> Estimate:
    limit = max(terms, key=lambda term: terms[term])
    return Estimate(terms[limit], limit)  # type: ignore[arg-type]
