"""What a decode costs: bytes and relative time of each rung, from sizes alone. No torch.

The decoder is a list of steps that go through single frames (`runtime/vae_tiles.py` runs it), so its memory
is what the steps keep between frames plus the worst moment of one step:

    weights + latents + features before the split + rings of all steps + max over steps(input, output,
    temporary) + frames of the piece being made, and of the one that its taker still holds

A ring is three input frames of a convolution: at full resolution 3 x 96 x H x W values, seven times. With
tiles, everything from the split on is that of the largest tile with its margins. The list below mirrors
`Decoder.frame_steps`; a test holds it to the model's names, sizes and measured live bytes.

Time is multiplications, those of the margins included, until tiles get so small that the GPU is done before
the next kernels are launched: then a tile takes as long as its launches do, whatever its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

from runtime.layers.tiles import EVERYWHERE, WHOLE, Rung, band_rows, cuts, halos

__all__ = ["WHOLE", "Rung", "decode_bytes", "decode_time_factor", "decode_workspace", "rungs"]

WORKSPACE_SHARE = 0.029
"""Bytes that the convolution library and the allocator's holes take on a GPU, in parts of `decode_bytes`.

No formula here can see them. Fitted on an H200 (torch 2.11, cuDNN 9.19, both ladders, 480x832 and 720x1280,
without the fused kernels): with the plan's own reserve for torch (`runtime.memory.costs.reserved`) the memory
that torch reserved was 0.1 to 4.9 % below the prediction in each of 20 rungs, and never above."""

H200_BF16 = 690e12
"""Operations a second of the card that LAUNCHES was fitted on, as its profile has them."""

LAUNCHES = 0.42
"""Time that launching the kernels of one latent frame takes for one tile, over the time in which an H200
computes a latent frame of 480x832. Fitted, with the exponent below, to the times of the same 20 rungs, 1.07
to 9.5 times that of the whole picture: they are met with 10 % of error (RMS), 37 % in the worst of them.
`tests/gpu/measure_decode.py --only rungs` prints the measured ratios beside these."""

OVERLAP = 3.0
"""Exponent of the sum of computing and launching: 1 would be one after the other, infinity the longer one."""

VECTORS = 64 << 10
"""Bytes of what has one number for each channel (biases that are added up, gammas in fp32), generously."""

BASE_DIM = 96  # of the published model
Z_DIM = 16
SPATIAL, TEMPORAL = 8, 4
WIDTHS = (4, 4, 2, 1)  # channels over base_dim of each resolution, coarse to fine
BLOCKS = 3  # residual blocks of each resolution
DOUBLES_RATE = (True, True, False)  # of the Upsample after each resolution but the last
FRAMES = 81  # of the published model's videos; the ladder is laid out for them
WORTH_A_RUNG = 0.88  # of the memory of the rung before it, what a rung may need at most
# Tiles along the longer side and along the shorter one, and where they begin: what a ladder is made of.
TILINGS = (
    ((2, 1), 1),
    *((cut, 0) for cut in ((2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (5, 2), (4, 3), (5, 3), (4, 4), (5, 4))),
    *((cut, 0) for cut in ((6, 4), (6, 6))),
)


@dataclass(frozen=True)
class _Step:
    """One step on frames of `dim_in` channels; `rate` frames enter it for each latent frame but the first."""

    kind: str  # enter, residual, attention, double, enlarge, leave
    dim_in: int
    dim_out: int
    rate: int
    reach: int = 0
    scale: int = 1

    @property
    def weights(self) -> int:
        """Values of its parameters."""
        a, b = self.dim_in, self.dim_out
        residual = a + 27 * a * b + b + b + 27 * b * b + b + (0 if a == b else a * b + b)
        return {
            "enter": 27 * a * b + b + Z_DIM * Z_DIM + Z_DIM,  # and the pointwise convolution before it
            "residual": residual,
            "attention": a + 4 * (a * a + a),
            "double": 3 * a * b + b,
            "enlarge": 9 * a * b + b,
            "leave": a + 27 * a * b + b,
        }[self.kind]

    @property
    def work(self) -> int:
        """Multiplications for each pixel of its input."""
        return 16 * self.dim_in * self.dim_out if self.kind == "enlarge" else self.weights

    @property
    def convolutions(self) -> int:
        """How many it has, each with the kernels around it: what launching it takes."""
        return 2 if self.kind == "residual" else 1

    @property
    def kept(self) -> int:
        """Values that it keeps between frames for each pixel: its convolutions' rings."""
        rings = {"enter": self.dim_in, "residual": self.dim_in + self.dim_out}
        return 3 * (rings | {"double": self.dim_in, "leave": self.dim_in}).get(self.kind, 0)

    @property
    def held(self) -> int:
        """Values that it keeps whatever the size: the sums of an enlarging convolution's weights."""
        return 16 * self.dim_in * self.dim_out if self.kind == "enlarge" else 0


def rungs(height: int, width: int) -> tuple[Rung, ...]:
    """The ladder for videos of height x width pixels: fastest first, each rung leaner than the one before.

    Of `TILINGS`, those that need less memory than all faster ones, as far as a rung saves enough to be worth
    its time.
    """
    return _ladder(height, width)


def decode_bytes(
    rung: Rung, height: int, width: int, frames: int, base_dim: int = BASE_DIM, itemsize: int = 2
) -> int:
    """The most bytes of tensors alive at once in a decode of one video, the decoder's weights included.

    Args:
        height, width: of the video, pixels.
        frames: of the video, 4n + 1.
        itemsize: bytes of a value: 2 for bf16 and fp16, 4 for fp32.
    """
    steps = decoder_steps(base_dim)
    before, after = _parts(steps, rung)
    length = (frames - 1) // TEMPORAL + 1
    size = height // SPATIAL, width // SPATIAL
    weights = sum(step.weights for step in steps) * itemsize + VECTORS
    latents = Z_DIM * length * prod(size) * 4  # the caller's, fp32
    z = Z_DIM * length * prod(size) * itemsize  # the same, as the decoder takes them
    if not before:
        return weights + latents + z + _passing(after, _whole(after, size), frames, itemsize)

    grid = rung.grid(*size)
    kept_frames = 1 + before[-1].rate * (length - 1)
    features = kept_frames * before[-1].dim_out * prod(grid) * itemsize
    preparing = z + _passing(before, _whole(before, size), frames, itemsize)
    return (
        weights + latents + features + max(preparing, _passing(after, _largest(rung, size), frames, itemsize))
    )


def decode_workspace(live: int) -> int:
    """Bytes that a decode on a GPU takes beside the `live` ones of `decode_bytes` and the plan's reserve."""
    return int(WORKSPACE_SHARE * live)


def decode_time_factor(rung: Rung, height: int, width: int, speed: float = 1.0) -> float:
    """Time of the rung's decode over that of the whole picture's: 1.0 and what margins and small tiles add.

    Args:
        speed: of the card over an H200's: a slower one has less to wait for the launches of small tiles.
    """
    if rung.split is None:
        return 1.0
    size = height // SPATIAL, width // SPATIAL
    steps = decoder_steps(BASE_DIM)
    # Multiplications that an H200 does while the kernels of one latent frame are launched.
    launching = LAUNCHES * speed * _work(steps, _whole(steps, (60, 104)))
    before, after = _parts(steps, rung)
    down, across = _profiles(rung, size)
    tiles = sum(
        down[rows] * across[columns] * _time(after, [*zip(rows, columns, strict=True)], launching)
        for rows in down
        for columns in across
    )
    first = _time(before, _whole(before, size), launching)
    return (first + tiles) / _time(steps, _whole(steps, size), launching)


@cache
def decoder_steps(base_dim: int) -> tuple[_Step, ...]:
    """The decoder's steps, in order."""
    coarse = WIDTHS[0] * base_dim
    steps = [
        _Step("enter", Z_DIM, coarse, 1, reach=1),
        _Step("residual", coarse, coarse, 1, reach=2),
        _Step("attention", coarse, coarse, 1, reach=EVERYWHERE),
        _Step("residual", coarse, coarse, 1, reach=2),
    ]
    dim, rate = coarse, 1
    for level, width in enumerate(WIDTHS):
        for _ in range(BLOCKS):
            steps.append(_Step("residual", dim, width * base_dim, rate, reach=2))
            dim = width * base_dim
        if level == len(WIDTHS) - 1:
            break
        if DOUBLES_RATE[level]:
            steps.append(_Step("double", dim, 2 * dim, rate))
            rate *= 2
        steps.append(_Step("enlarge", dim, dim // 2, rate, reach=1, scale=2))
        dim //= 2
    return (*steps, _Step("leave", dim, 3, rate, reach=1))


def _parts(steps: Sequence[_Step], rung: Rung) -> tuple[Sequence[_Step], Sequence[_Step]]:
    """The steps before the rung's split, none for the whole picture, and those from it on."""
    if rung.split is None:
        return (), steps
    enlarging = [number for number, step in enumerate(steps) if step.kind == "enlarge"]
    cut = enlarging[rung.split] - DOUBLES_RATE[rung.split]  # the frame rate is the Upsample's first step
    return steps[:cut], steps[cut:]


def _whole(steps: Sequence[_Step], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of what enters each step for a picture of that size; then those of the result."""
    sizes = [size]
    for step in steps:
        sizes.append((sizes[-1][0] * step.scale, sizes[-1][1] * step.scale))
    return sizes


@cache
def _margins(split: int) -> list[tuple[int, int]]:
    """Of each step from the split on, then of the result: the margin of its input and the scale there."""
    steps = _parts(decoder_steps(BASE_DIM), Rung("", split, 1, 1))[1]
    scales = [1]
    for step in steps:
        scales.append(scales[-1] * step.scale)
    return [*zip(halos(steps), scales, strict=True)]


@lru_cache(maxsize=256)
def _lengths(split: int, length: int, parts: int) -> dict[tuple[int, ...], int]:
    """One axis of `length` pixels in so many parts: pixels that enter each step -> parts that are so."""
    found: dict[tuple[int, ...], int] = {}
    for part in cuts(length, parts):
        pixels = tuple(
            min(part.stop * scale + margin, length * scale) - max(part.start * scale - margin, 0)
            for margin, scale in _margins(split)
        )
        found[pixels] = found.get(pixels, 0) + 1
    return found


def _profiles(rung: Rung, size: tuple[int, int]) -> tuple[dict[tuple[int, ...], int], ...]:
    """`_lengths` of the rung's rows and of its columns."""
    assert rung.split is not None
    grid = rung.grid(*size)
    return tuple(
        _lengths(rung.split, n, parts) for n, parts in zip(grid, (rung.rows, rung.columns), strict=True)
    )


def _largest(rung: Rung, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of what enters each step from the split on, at most."""
    down, across = _profiles(rung, size)
    return [
        (max(rows), max(columns))
        for rows, columns in zip(zip(*down, strict=True), zip(*across, strict=True), strict=True)
    ]


def _passing(steps: Sequence[_Step], sizes: Sequence[tuple[int, int]], frames: int, itemsize: int) -> int:
    """Bytes that the steps need for one tile: rings, the worst moment, the frames of its pieces."""
    later = frames > 1
    leaves = steps[-1].kind == "leave"
    frame = 3 * prod(sizes[-1]) * 4 if leaves else 0  # fp32
    given = worst = kept = 0  # given: the tensor that a step's input is a part of
    doublings = sum(step.kind == "double" for step in steps)
    waiting: list[int] = []  # where one frame became two, what holds the second until the first is through
    for step, (height, width) in zip(steps, sizes, strict=False):
        if step.kind == "double" and not later:
            continue  # the first frame of a video passes
        kept += (step.kept * height * width + step.held) * itemsize
        beside = _waiting(waiting, doublings, frame) if later else 0
        worst = max(worst, given + beside + _moment(step, height, width, itemsize))
        if step.kind == "enlarge" and len(waiting) < doublings and later:
            waiting.append(given)
        given = step.dim_out * height * width * step.scale**2 * itemsize
    if not leaves:
        return kept + worst
    finishing = given + frame + (_waiting(waiting, doublings, frame) if later else 0)
    worst = max(worst, finishing)
    # Beside a piece that is made, and while its frames are joined, its taker may still hold the one before.
    count = TEMPORAL if later else 1
    return kept + max(worst + count * frame, 3 * count * frame)


def _waiting(waiting: Sequence[int], doublings: int, frame: int) -> int:
    """The most bytes of frames that wait, and of finished ones of `frame` bytes, while a step runs.

    A frame that enters becomes 2**doublings; `waiting` are the bytes at each doubling that lies behind.
    """
    count = 2**doublings
    moments = range(0, count, count >> len(waiting))  # frames of this one that are finished
    return (TEMPORAL - count) * frame + max(
        done * frame + sum(n for i, n in enumerate(waiting) if not done & (count >> (i + 1)))
        for done in moments
    )


def _moment(step: _Step, height: int, width: int, itemsize: int) -> int:
    """Bytes that one step makes beside its rings and its input of height x width, at its worst moment."""
    area = height * width
    output = step.dim_out * area * step.scale**2 * itemsize

    def turned(dim_in: int) -> int:
        """The weights of a convolution in the order of its ring."""
        taps = 3 if step.kind == "double" else 27
        return taps * dim_in * step.dim_out * itemsize

    def norm(channels: int) -> int:
        """A band of fp32 values, and the norm of each pixel."""
        row = channels * width * 4
        return min(band_rows(row), height) * row + area * 4

    if step.kind == "residual":
        shortcut = output if step.dim_in != step.dim_out else 0
        first = max(norm(step.dim_in), output + turned(step.dim_in))
        return max(first, output + max(norm(step.dim_out), turned(step.dim_out), shortcut))
    if step.kind == "attention":
        return 6 * output  # q, k and v, as the convolution makes them and again with channels last
    if step.kind == "enlarge":
        return 4 * step.dim_out * (height + 1) * (width + 1) * itemsize + output
    if step.kind == "leave":
        return max(norm(step.dim_in), output + turned(step.dim_in))
    return output + (turned(step.dim_in) if step.kind in ("enter", "double") else 0)


def _work(steps: Sequence[_Step], sizes: Sequence[tuple[int, int]]) -> int:
    """Multiplications for one tile of a long video, for each latent frame."""
    return sum(step.rate * step.work * h * w for step, (h, w) in zip(steps, sizes, strict=False))


def _time(steps: Sequence[_Step], sizes: Sequence[tuple[int, int]], launching: float) -> float:
    """`_work`, or the steps' share of `launching` where that is longer, with a soft change between them."""
    kernels, of = (
        sum(step.rate * step.convolutions for step in some) for some in (steps, decoder_steps(BASE_DIM))
    )
    return float((_work(steps, sizes) ** OVERLAP + (launching * kernels / of) ** OVERLAP) ** (1 / OVERLAP))


@lru_cache(maxsize=32)
def _ladder(height: int, width: int) -> tuple[Rung, ...]:
    high, wide = height // SPATIAL, width // SPATIAL
    tilings = []
    for (longer, shorter), split in TILINGS:
        rows, columns = (longer, shorter) if high > wide else (shorter, longer)
        if rows <= high and columns <= wide:
            tilings.append(Rung(f"{rows}x{columns}-{('early', 'late')[split]}", split, rows, columns))
    cost = {rung: decode_bytes(rung, height, width, FRAMES) for rung in (WHOLE, *tilings)}
    found = [WHOLE]
    for rung in sorted(tilings, key=lambda one: (decode_time_factor(one, height, width), cost[one])):
        if cost[rung] <= WORTH_A_RUNG * cost[found[-1]]:
            found.append(rung)
    return tuple(found)
