"""The gated residual in one pass, in place.

    x[m,d] <- round(x[m,d] + branch[m,d] * gate[d])        fp32 product, fp32 sum, then to x's dtype

x and branch (..., D) of one dtype, contiguous; gate (D,) fp32. One program holds a tile of 8 rows by up to
512 columns: 6 bytes for each bf16 entry. The kernel equals its twin bit for bit (fused multiply-adds are
switched off), so the residual stream does not depend on which of the two ran.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_vector, rows_of, tl

_ROWS, _COLUMNS = 8, 512


def gated_add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + branch·gate, in place; x and branch (..., D), gate D numbers, fp32. Returns x.

    Raises ValueError where shapes differ or rows are not contiguous.
    """
    return (gated_add_triton if fused(x) else gated_add_torch)(x, branch, gate)


def gated_add_torch(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The formula in plain torch."""
    return x.copy_(x + branch * gate.reshape(-1))


def gated_add_triton(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The kernel."""
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of x, {tuple(x.shape)}")
    rows, branches = rows_of(x), rows_of(branch.contiguous(), "branch")
    count, width = rows.shape
    grid = (-(-count // _ROWS), -(-width // _COLUMNS))
    if count:
        with on(x):
            _gated_add_kernel[grid](
                rows,
                branches,
                row_vector(gate, width, "gate"),
                count,
                WIDTH=width,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return x


@jit
def _gated_add_kernel(x, branch, gate, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    places = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    inside = (rows < count)[:, None] & within[None, :]
    factor = tl.load(gate + columns, mask=within, other=0.0).to(tl.float32)
    old = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + places, (old + added * factor[None, :]).to(x.dtype.element_ty), mask=inside)
