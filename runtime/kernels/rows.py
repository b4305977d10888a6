"""Pieces that several kernels share: the largest entry of a row, and a row to eight bits.

    s = max(absmax(y), 1e-30) / qmax      q = round(y / s), ties to even       qmax 448 for e4m3, 127 for int8

The numbers are those of the twins to the last bit (where y is):
- The maximum is taken over the bits of |y|, which order as the numbers do, with NaN above infinity. The GPU's
  own maximum would drop a NaN, and the row would look healthy.
- The division is exact: a product with the row's reciprocal, then one step of refinement by fused
  multiply-adds (Markstein). That costs three instructions; the exact division of CUDA costs about ten.
- Adding 1.5*2^23 rounds to an integer, ties to even, and leaves that integer in the low bits.
- A row with NaN or infinity gets the scale NaN, so it is NaN again after scaling, whatever q is.
No entry can exceed qmax by more than half a unit, so nothing has to be clamped.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from runtime.kernels.launch import jit, tl


@jit
def absmax_bits(y):
    """The bits of the largest |y| (N,) fp32, as int32: NaN if any entry is."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@jit
def row_scale(bits, INTEGER: tl.constexpr):
    """(scale to divide by, its reciprocal, scale to store) of a row, from the bits of its largest |y|."""
    absmax = bits.to(tl.float32, bitcast=True)
    qmax = 127.0 if INTEGER else 448.0
    # tl.maximum takes the number where the other one is NaN: the scale to store is set below.
    scale = tl.div_rn(tl.maximum(absmax, 1e-30), qmax)
    finite = bits < 0x7F800000
    return scale, tl.div_rn(1.0, scale), tl.where(finite, scale, float("nan"))


@jit
def quantized(y, scale, reciprocal, INTEGER: tl.constexpr):
    """y (N,) fp32 over the row's scale, rounded to nearest, ties to even; int8 or e4m3."""
    near = y * reciprocal
    ratio = tl.fma(tl.fma(-near, scale, y), reciprocal, near)
    if INTEGER:  # one exit: Triton would compile what follows a return, and sm_80 knows no e4m3
        entry = (ratio + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        entry = ratio.to(tl.float8e4nv)
    return entry


@jit
def store_row(a, b, q, scale_place, places, beyond, inside, TAIL: tl.constexpr, INTEGER: tl.constexpr):
    """A row to eight bits, with its scale: its main part a and, with TAIL, the rest b, as far as `inside`."""
    bits = absmax_bits(a)
    if TAIL:
        bits = tl.maximum(bits, absmax_bits(b))
    scale, reciprocal, stored = row_scale(bits, INTEGER)
    tl.store(scale_place, stored)
    tl.store(q + places, quantized(a, scale, reciprocal, INTEGER))
    if TAIL:
        tl.store(q + beyond, quantized(b, scale, reciprocal, INTEGER), mask=inside)
