"""Attention in e4m3 for Hopper (compute capability 9.0), in Gluon: loads by TMA, products by warp groups.

    s[l, j] = q8[l]·k8[j]·descale·scale·log2(e)        m = running max over j of s
    w = 2^(s - m)                                      in fp32; the sum t of w is that of these
    out = (Σ_j e4m3(256·w)·v8[j]) / (256·t) · factor + center

q8 (L, H, 128), k8 (S, H, 128) and v8 (H·128, S rounded up to 128) of `attention_quantize.quantize_by_sample`.
FP8 tensor cores read both factors along the summed axis, so the values of a channel lie side by side, and in
the order in which a thread holds the weights after the first product (`slots`): none has to move.

One program takes 192 queries of a head: three warp groups of 64 queries each, and a warp that loads. Keys and
values come in tiles of 128 through a ring of shared memory, one barrier for each tile that is ready and one
for each that is free. While one group does its softmax, the others have the tensor cores.

**The sum over a tile joins the others in fp32.** A tensor core adds FP8 products to a sum of 14 bits and cuts
off what is below, so that the sum of 32,760 keys loses whatever is a 2^-13th of it: where most keys pull a
channel to one side, outputs shrink by 29 % (measured on an H200, with cuDNN's kernel and with this one
written so). Sums of 128 keys are cut 4 times: the same case comes out at .999. It costs 4 % of the time.

The twin is in `attention_in_columns.py`, which needs no Triton. Raises ImportError where Triton is missing or
older than 3.6: Gluon's warp groups are as here from then on.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import math

import triton
from torch import Tensor

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"Triton {triton.__version__} has no Gluon as it is needed here, expected 3.6 or later")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from runtime.kernels.attention_in_columns import WEIGHT_SCALE
from runtime.kernels.launch import on

GROUPS, ROWS, KEYS, HEAD_DIM = 3, 64, 128, 128  # warp groups; queries of each; keys of a tile
STAGES = 4  # tiles of keys and of values in shared memory: 152 KiB with the queries, of 227
REGISTERS = (160, 160, 24)  # of a thread of the other two groups and of the loading warp
LAUNCH_REGISTERS = 128  # 16 warps share 65,536; the first group keeps what those leave, 168


def attend(
    q8: Tensor,
    k8: Tensor,
    columns: Tensor,
    descale: Tensor,
    factor: Tensor,
    center: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """The kernel, on the current stream, into out (L, H, D) of 16 bits. Shapes as of the twin; contiguous.

    Raises ValueError for heads of another size than 128.
    """
    (length, heads, head_dim), keys = q8.shape, len(k8)
    if head_dim != HEAD_DIM:
        raise ValueError(f"heads of {head_dim}, expected {HEAD_DIM}")
    width = heads * head_dim
    with on(q8):
        _attend_kernel[(-(-length // (GROUPS * ROWS)), heads)](
            _tiles(q8.view(length, width), ROWS, HEAD_DIM),
            _tiles(k8.view(keys, width), KEYS, HEAD_DIM),
            _tiles(columns, HEAD_DIM, KEYS),
            out,
            center,
            factor,
            descale,
            scale * math.log2(math.e),
            length,
            keys,
            width,
            GROUPS=GROUPS,
            STAGES=STAGES,
            LOG_SCALE=math.log2(WEIGHT_SCALE),
            REGISTERS=REGISTERS,
            num_warps=4,
            maxnreg=LAUNCH_REGISTERS,
        )
    return out


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA needs to fetch tiles (rows, columns) of x; outside x they are zeros."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


# --- the loading warp ---


@gluon.jit
def _load(given, q_tiles, q_ready, k_ring, v_ring, place):
    """Fetch the queries, then keys and values in turn as room for them comes free."""
    q, k, v = given
    k_tiles, k_ready, k_free = k_ring
    v_tiles, v_ready, v_free = v_ring
    row, head, steps = place
    GROUPS: gl.constexpr = q_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[1]
    STAGES: gl.constexpr = k_tiles.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[1]
    HEAD: gl.constexpr = k_tiles.shape[2]
    mbarrier.expect(q_ready, GROUPS * ROWS * HEAD)
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q, [row + group * ROWS, head * HEAD], q_ready, q_tiles.index(group))
    for step in range(steps):
        stage = step % STAGES
        # A barrier that nobody has arrived at counts as one whose phase before is over: the first round.
        over = (step // STAGES + 1) & 1
        key = (steps - 1 - step) * KEYS
        mbarrier.wait(k_free.index(stage), over)
        mbarrier.expect(k_ready.index(stage), KEYS * HEAD)
        tma.async_copy_global_to_shared(k, [key, head * HEAD], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), over)
        mbarrier.expect(v_ready.index(stage), KEYS * HEAD)
        tma.async_copy_global_to_shared(v, [head * HEAD, key], v_ready.index(stage), v_tiles.index(stage))


# --- a warp group of queries ---


@gluon.jit
def _scores(q, ring, step):
    """q8·kᵀ8 of this step's keys, (ROWS, KEYS) fp32."""
    tiles, ready, free = ring
    ROWS: gl.constexpr = q.shape[0]
    STAGES: gl.constexpr = tiles.shape[0]
    KEYS: gl.constexpr = tiles.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    stage = step % STAGES
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout=LAYOUT)
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    keys = tiles.index(stage).permute((1, 0))
    scores = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(free.index(stage), count=1)
    return scores


@gluon.jit
def _as_operand(w, LAYOUT: gl.constexpr):
    """Weights in e4m3 as left factor of a product: the same registers otherwise named (`slots`)."""
    ROWS: gl.constexpr = w.shape[0]
    KEYS: gl.constexpr = w.shape[1]
    w = gl.reshape(w, [ROWS, KEYS // 16, 2, 4, 2])
    w = gl.reshape(gl.permute(w, [0, 1, 3, 2, 4]), [ROWS, KEYS])
    w = gl.convert_layout(w, gl.DotOperandLayout(0, LAYOUT, 4), assert_trivial=True)
    return gl.inline_asm_elementwise(
        """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,r,r,r,r",
        [w],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _add_keys(scores, state, ring, step, factor, LOG_SCALE: gl.constexpr):
    """state with this step's keys: (Σ w·v8 of the keys so far, m of the scores before `factor`, t)."""
    sums, top, total = state
    tiles, ready, free = ring
    ROWS: gl.constexpr = scores.shape[0]
    STAGES: gl.constexpr = tiles.shape[0]
    HEAD: gl.constexpr = tiles.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 32])
    higher = gl.maximum(top, gl.max(scores, axis=1))
    shrink = gl.exp2((top - higher) * factor)
    w = gl.exp2(scores * factor - (higher * factor - LOG_SCALE)[:, None])
    total = total * shrink + gl.sum(w, axis=1)
    w8 = _as_operand(w, LAYOUT)
    stage = step % STAGES
    nothing = gl.zeros([ROWS, HEAD], gl.float32, layout=LAYOUT)
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    part = warpgroup_mma(w8, tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, deps=[part])
    mbarrier.arrive(free.index(stage), count=1)
    by = gl.convert_layout(shrink, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return sums * by[:, None] + part, higher, total


@gluon.jit
def _attend_group(
    group: gl.constexpr,
    q_tiles,
    q_ready,
    k_ring,
    v_ring,
    place,
    result,
    keys,
    factor,
    LOG_SCALE: gl.constexpr,
):
    """All keys for one group's queries."""
    row, head, steps = place
    out, rows, stride, center, gain = result
    ROWS: gl.constexpr = q_tiles.shape[1]
    HEAD: gl.constexpr = q_tiles.shape[2]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 32])
    sums = gl.zeros([ROWS, HEAD], gl.float32, layout=SUMS)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    q = q_tiles.index(group)
    mbarrier.wait(q_ready, 0)
    # The last tile comes first: it alone may reach beyond the last key.
    scores = _scores(q, k_ring, 0)
    key = (steps - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where((key < keys)[None, :], scores, float("-inf"))
    sums, top, total = _add_keys(scores, (sums, top, total), v_ring, 0, factor, LOG_SCALE)
    for step in range(1, steps):
        scores = _scores(q, k_ring, step)
        sums, top, total = _add_keys(scores, (sums, top, total), v_ring, step, factor, LOG_SCALE)
    columns = head * HEAD + gl.arange(0, HEAD, layout=gl.SliceLayout(0, SUMS))
    where = row + group * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    inverse = 1.0 / gl.convert_layout(total, gl.SliceLayout(1, SUMS), assert_trivial=True)
    y = sums * inverse[:, None] * gl.load(gain + columns)[None, :] + gl.load(center + columns)[None, :]
    places = where.to(gl.int64)[:, None] * stride + columns[None, :]
    gl.store(out + places, y.to(out.dtype.element_ty), mask=(where < rows)[:, None])


# --- the program ---


# One program for all lengths: their divisors change nothing in it, and each variant takes seconds to compile.
@gluon.jit(do_not_specialize=["rows", "keys"])
def _attend_kernel(
    q,
    k,
    v,
    out,
    center,
    gain,
    descale,
    scale,
    rows,
    keys,
    stride,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    LOG_SCALE: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, q.block_shape[0], q.block_shape[1]], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, k.block_shape[0], k.block_shape[1]], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, v.block_shape[0], v.block_shape[1]], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=GROUPS)
        mbarrier.init(v_free.index(stage), count=GROUPS)
    fence_async_shared()

    head = gl.program_id(1)
    factor = gl.load(descale + head) * scale
    KEYS: gl.constexpr = k.block_shape[0]
    place = (gl.program_id(0) * (GROUPS * q.block_shape[0]), head, (keys + KEYS - 1) // KEYS)
    result = (out, rows, stride, center, gain)
    k_ring, v_ring = (k_tiles, k_ready, k_free), (v_tiles, v_ready, v_free)
    gl.warp_specialize(
        [
            (_attend_group, (0, q_tiles, q_ready, k_ring, v_ring, place, result, keys, factor, LOG_SCALE)),
            (_attend_group, (1, q_tiles, q_ready, k_ring, v_ring, place, result, keys, factor, LOG_SCALE)),
            (_attend_group, (2, q_tiles, q_ready, k_ring, v_ring, place, result, keys, factor, LOG_SCALE)),
            (_load, ((q, k, v), q_tiles, q_ready, k_ring, v_ring, place)),
        ],
        [4, 4, 1],
        REGISTERS,
    )
