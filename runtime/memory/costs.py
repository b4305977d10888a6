"""What each phase costs in memory and in time: formulas, their derivations, and the constants behind them.

Sizes are bytes, times seconds. L is the number of tokens, D and F the widths of the transformer and of its
feed-forward, e the bytes of an activation, S the tokens of a slice. U = L*D*e is one state of all tokens.
What can be counted is counted, and tests hold it to the real code at full size
(`tests/unit/test_plan_costs.py`). What cannot (allocators, workspaces of kernels, speeds) are the named
constants below, set from measurements.
"""

from dataclasses import dataclass

from runtime.memory.sizes import ModelSizes
from runtime.memory.speeds import Speeds

MIB, GIB = 2**20, 2**30

# --------------------------------------------------------------------------------------------- GPU constants

CUDA_CONTEXT = 512 * MIB
"""GPU memory that CUDA takes beside torch's own when it starts: context, kernels, cuBLAS and cuDNN
handles."""

VRAM_MARGIN = 192 * MIB
"""Free GPU memory that the plan leaves alone: a desktop that draws while a video is made."""

RESERVED_FIXED = 128 * MIB
"""Memory that torch reserves beyond live tensors, whatever their size: the workspace of matrix products
(32 MiB on Hopper, 8 elsewhere) and the last, partly used page of each pool."""

RESERVED_SHARE = 0.015
"""The same, in parts of the live bytes: holes between tensors, with expandable segments."""

ATTENTION_WORKSPACE = 4
"""Bytes per token and head that the attention kernel keeps: the logarithm of its sums, fp32."""

STATES = 5.0
"""States of all tokens, U each, that an attention in 16 bits has alive: x, q, k, v and its result."""

STATES_8BIT = {
    "hopper-fp8": 3.5,
    "cudnn-fp8": 6.0,
    "sage1": 8.0,
    "sage2": 7.5,
    "sage2-sm90": 8.5,
    "sage2-fp16": 7.0,
    "sage2-fp32": 7.5,
}
"""The same in 8 bits, by backend: x, q, k, v, the 8-bit copies of the last three (half a U each), and the
result, which cuDNN makes in 8 bits. SageAttention 2 has v in 16 bits twice while it turns it around, and on
sm_90 a third time, longer by a few keys; release 1 has a copy of k. hopper-fp8 takes compact q and k
(`runtime/layers/compact_qk.py`), half a U each and no others, and puts the result into v's place. Counted for
hopper-fp8 and cuDNN (`tests/unit/test_compact_qk.py`, `test_cudnn_fp8.py`), measured on an H200 for sage1,
sage2-sm90 and sage2-fp16, read from the published code for the rest."""

COMPACT = {"hopper-fp8"}
"""Attentions whose q and k are compact: 3U live throughout a forward instead of 4U."""

FASTER_8BIT = 1.4
"""Of an attention in 8 bits against one in 16: 27.4 against 38.4 ms on the H200. Elsewhere a guess."""

LONG_SLICE_ROOM = 2.0
"""States for a slice beside an attention in 8 bits, where memory is not short, beyond what lives throughout:
three slices at 480x832x81, where the least that such an attention needs would make four or more."""

LONGEST_SLICE = 4096
"""Tokens that a slice has at least, unless memory is short."""

LATENT_COPIES = 6
"""fp32 tensors of the latents' size during a step: latents, noise, velocity, their unpatching, the
sampler's sum."""

# ------------------------------------------------------------------------------------- the plain-torch path

LINEAR_SLICE = 2**25
"""Numbers that an 8-bit Linear holds in fp32 at a time (`runtime.linear.module.SLICE_ELEMENTS`)."""

QUANTIZING = 5
"""Bytes per number while a row is quantized: fp32 and the 8-bit result."""

INTEGER_SUMS = 8
"""Bytes per number of an int8 product: the int32 sums and their fp32 copy."""

# --------------------------------------------------------------------------------------------- host constants

PROCESS_CUDA = 1720 * 10**6
"""Resident memory of a process with torch, CUDA's libraries, Triton's compiler and cuDNN's graphs, before it
has read anything: four runs on the H200."""

PROCESS_CPU = 330 * 10**6
"""The same with the CPU build of torch, which has no CUDA libraries; with Triton installed, 73 MB of it."""

RAM_MARGIN = 512 * MIB
"""Available RAM that the plan leaves to everything else."""

HOST_SLACK = 64 * MIB
"""Headers of the files, tokenizer, Python's own growth during a run."""

STAGED = 128 * MIB
"""A tensor on its way to the GPU outside of the ring: a piece of 64 MiB as it was read, and another as it is
copied (`runtime.checkpoint`)."""

DECODE_HOST = 96 * MIB
"""What the decode's own libraries (cuDNN's convolutions) and its pinned copies of frames add to the process;
from runs on the H200."""

ENCODER_BASE = 16 * MIB
"""The mp4 encoder's memory for the smallest picture (`runtime.video_writer`, a test compares)."""

ENCODER_PIXEL = 144
"""Bytes per pixel of a picture that it holds: lookahead, references, threads."""

# -------------------------------------------------------------------------------------------- time constants

PASSES = {"fp8": 470.0, "int8": 790.0, "bf16": 207.0}
"""How often a block reads and writes U beside products and attention, all tensors together. Fitted to the
H200's 3.63, 4.94 and 3.34 s a forward with plain torch kernels (README); fused kernels lower it."""

FUSED_PASSES = {"fp8": 88.0, "int8": 88.0, "bf16": 56.0}
"""The same with fused kernels, from 2.44 s (fp8) and 2.87 s (bf16) a forward on the H200."""

TEXT_EFFICIENCY = 0.3
"""Share of the speed of large products that those of a few hundred tokens get."""

DECODE_EFFICIENCY = 0.42
"""Share of the bf16 products' speed that the VAE's convolutions get: 246 TFLOP in 0.85 s on the H200."""

DECODE_FLOPS = 7.7e6 / 96**2
"""Operations per pixel of a frame and base_dim^2: 27-tap convolutions at full, half, quarter resolution."""

MP4_SECONDS = 2.1e-8
"""Encoding a pixel: 0.67 s for 81 frames of 480x832 on the H200's host."""

MP4_LEFT = 0.18
"""Of the encoding, what is left after the last frame was decoded: the encoder looks ahead, and the last piece
comes at once. 0.12 of 0.67 s at 480p, 0.25 of 1.57 at 720p."""

START_SECONDS = 4.0
"""From the command to the first read of weights with CUDA: Python, torch, the context."""

START_CPU_SECONDS = 2.0
"""The same on a machine without."""


# -------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """A video as the transformer sees it."""

    height: int
    width: int
    frames: int

    @property
    def latent_frames(self) -> int:
        """T."""
        return (self.frames - 1) // 4 + 1

    @property
    def tokens(self) -> int:
        """L = T * h/2 * w/2 patches of latents, h and w an eighth of the pixels."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)

    @property
    def latents(self) -> int:
        """Bytes of the latents in fp32."""
        return 4 * 16 * self.latent_frames * (self.height // 8) * (self.width // 8)

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.frames * self.height * self.width


# --------------------------------------------------------------------------------------------- memory: phases


def reserved(live: int) -> int:
    """What torch reserves for `live` bytes of tensors, beyond them."""
    return RESERVED_FIXED + int(live * RESERVED_SHARE)


def usual_slice(sizes: ModelSizes, video: Geometry, fused: bool, attention: str = "") -> int:
    """Tokens of a slice where memory is not short: as many as need no more than the attention does, or two
    states where it is in 8 bits.
    """
    room = states_beside(attention)
    return _slice_within(
        max(room, LONG_SLICE_ROOM) if attention in STATES_8BIT else room, sizes, video, fused
    )


def free_slice(sizes: ModelSizes, video: Geometry, fused: bool, attention: str = "") -> int:
    """Tokens of the longest slice that needs no more than the attention does; at least LONGEST_SLICE."""
    return _slice_within(states_beside(attention), sizes, video, fused)


def held_states(attention: str = "") -> float:
    """States that live throughout a forward in slices: x, q, k and v."""
    return 3.0 if attention in COMPACT else 4.0


def states_beside(attention: str = "") -> float:
    """States that the attention has alive beyond those."""
    return STATES_8BIT.get(attention, STATES) - held_states(attention)


def _slice_within(states: float, sizes: ModelSizes, video: Geometry, fused: bool) -> int:
    """Tokens of a slice for which so many U suffice, beside what lives throughout (`activations`).

    All slices are as long as each other, in steps of 256 tokens.
    """
    room = states * video.tokens * sizes.dim * sizes.itemsize
    each = slice_bytes(sizes, 1024, fused) / 1024
    most = max(int(room / each) // 256 * 256, LONGEST_SLICE)
    even = -(-video.tokens // -(-video.tokens // most))
    return max(-(-even // 256) * 256, LONGEST_SLICE)


def activations(
    sizes: ModelSizes,
    video: Geometry,
    token_slice: int | None,
    forwards: int = 1,
    fused: bool = False,
    attention: str = "",
) -> int:
    """Most bytes alive during one forward, weights not counted. attention: the 8-bit backend, if it is one.

    Sliced (`Transformer.velocity`): x, and q, k, v in one workspace, live throughout: 4U, with compact q and
    k 3U. Attention writes one U more, which goes to v's place, and in 8 bits has its copies; then slices run
    beside the 4U: max(5U + workspace, 4U + slice). A video of one slice has no workspace: x and attention's
    result live beside the slice, 2U + slice, or again 5U. To it come the rotary table (cosines and sines,
    fp32, half a head each), keys and values of the text, the embedded text of each forward, and the latents.
    """
    tokens, e = video.tokens, sizes.itemsize
    state = tokens * sizes.dim * e
    states = STATES_8BIT.get(attention, STATES)
    mixing = int(states * state) + tokens * sizes.num_heads * ATTENTION_WORKSPACE
    if token_slice is None or token_slice >= tokens:
        block = max(mixing, 2 * state + slice_bytes(sizes, tokens, fused))
    else:
        block = max(mixing, int(held_states(attention) * state) + slice_bytes(sizes, token_slice, fused))
    rope = 2 * tokens * (sizes.head_dim // 2) * 4
    text = sizes.text_len * sizes.dim * e * (2 + forwards)
    return block + rope + text + LATENT_COPIES * video.latents


def slice_bytes(sizes: ModelSizes, count: int, fused: bool = False) -> int:
    """Most bytes that `count` tokens need between two attentions, in the feed-forward.

    Fused kernels: the wide middle and what GELU makes of it, 2F numbers a token, or F and F bytes in 8 bit.
    Plain torch needs more:
    16 bit: the wide middle and its GELU, and the new x, (2F + D) numbers a token; or the norm before it, two
    fp32 tensors beside four of x's kind.
    8 bit, second product: the result of GELU, the new x and the product's own, F + 2D, while as many rows as
    an 8-bit Linear takes at a time are quantized. INT8, first product: the middle, x and the normalised x, F
    + 2D, while the sums of such rows come as int32 and fp32, beside the quantized rows.
    """
    d, f, e = sizes.dim, sizes.ffn_dim, sizes.itemsize
    if fused:
        return count * (f * (e + 1) if sizes.quantized else 2 * f * e) + count * d * e
    wide = count * max(e * (2 * f + d), (8 + 4 * e) * d)
    if not sizes.quantized:
        return wide
    rows = min(count, max(LINEAR_SLICE // max(d, f) // 256 * 256, 256))
    second = count * e * (f + 2 * d) + rows * f * QUANTIZING
    first = count * e * (f + 2 * d) + rows * (f * INTEGER_SUMS + d) if sizes.quantization == "int8" else 0
    return max(wide, second, first)


def text_keys_values(sizes: ModelSizes, texts: int) -> int:
    """Keys and values of `texts` texts in all blocks, kept: 2nD numbers a block and text."""
    return texts * sizes.blocks.count * 2 * sizes.text_len * sizes.dim * sizes.itemsize


def entry_activations(sizes: ModelSizes, steps: int, forwards: int) -> int:
    """Beside the visiting embeddings: the text states, and 2 + `forwards` tensors of embedded text.

    To them the time rows of all steps in fp32 (7D each).
    """
    text = sizes.text_len * (sizes.text_dim + (2 + forwards) * sizes.dim) * sizes.itemsize
    return text + steps * 7 * sizes.dim * 4


def text_activations(sizes: ModelSizes) -> int:
    """Most bytes alive while a prompt of the full length n goes through a block of the text encoder.

    The scores' bias (heads * n^2) twice, raw and with padding masked where there is any, and in fp32 once
    more where a kernel wants the scores whole; or the feed-forward: three tensors of n * ffn and, for 8 bit,
    fp32 rows of it.
    """
    n, e = sizes.text_len, sizes.itemsize
    states = 5 * n * sizes.text_dim * e
    scores = sizes.text_heads * n * n * (2 * e + 4)
    wide = (
        n * sizes.text_ffn * (3 * e + (INTEGER_SUMS + 1 if sizes.text_quantization in ("fp8", "int8") else 0))
    )
    return states + max(scores, wide)


def host_frames(video: Geometry) -> int:
    """RAM for the frames, 8-bit RGB, and what the mp4 encoder holds (`runtime.video_writer`)."""
    return 3 * video.pixels + ENCODER_BASE + ENCODER_PIXEL * video.height * video.width


# ------------------------------------------------------------------------------------------------------ time


def forward_seconds(sizes: ModelSizes, video: Geometry, speeds: Speeds, attention: str = "") -> float:
    """One forward of the transformer, its weights being there.

    Products: 2 * (6 D^2 + 2 D F) operations a token and block (q, k, v, o; cross q, o; feed-forward), and
    4 D^2 for each of the text's rows. Attention: 4 L^2 D, and 4 L n D with the text. The rest moves memory.
    """
    tokens, d, f = video.tokens, sizes.dim, sizes.ffn_dim
    products = tokens * 2 * (6 * d * d + 2 * d * f) + sizes.text_len * 4 * d * d
    faster = FASTER_8BIT if attention else 1.0  # which is of tokens among each other alone
    mixed = 4 * tokens * d * (tokens / faster + sizes.text_len)
    passes = FUSED_PASSES if speeds.fused else PASSES
    moved = passes.get(sizes.quantization, passes["bf16"]) * tokens * d * sizes.itemsize
    block = products / speeds.matmul(sizes.quantization) + mixed / speeds.attention + moved / speeds.memory
    return sizes.blocks.count * block


def text_seconds(sizes: ModelSizes, speeds: Speeds) -> float:
    """One prompt of the full length through the text encoder: 2 operations a number of its matrices and
    token.
    """
    width = {"fp8": 1, "int8": 1, "fp32": 4}.get(sizes.text_quantization, sizes.itemsize)
    numbers = sizes.text.count * sizes.text.matrices / width
    return 2 * sizes.text_len * numbers / (speeds.matmul(sizes.text_quantization) * TEXT_EFFICIENCY)


def decode_seconds(sizes: ModelSizes, video: Geometry, speeds: Speeds, factor: float) -> float:
    """Decoding all frames; `factor` is what the rung's tiles compute twice over."""
    dtype = "fp32" if sizes.vae_itemsize == 4 else "bf16"
    operations = DECODE_FLOPS * sizes.vae_base_dim**2 * video.pixels
    return factor * operations / (speeds.matmul(dtype) * DECODE_EFFICIENCY)
