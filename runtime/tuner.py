"""Measuring what `runtime.tuning` remembers: attention at the full length, the 8-bit products of a model.

    attention(device, size, dtype, proofs)       every backend that is right here, proven and timed at `size`
    product(device, "fp8", 5120, 5120, rows)     tiles of our kernel; then each way beside its error

Medians of interleaved runs, random inputs. Distances are relative, RMS, to the formula in fp32, over some of
the rows. Nothing is set or stored here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.errors import first_line
from runtime.kernels import launch, tune
from runtime.kernels.configs import Config, candidates
from runtime.kernels.row_quantize import row_quantize_torch
from runtime.kernels.tune import Run, Timing, picked
from runtime.kernels.w8a8 import w8a8_torch, w8a8_triton
from runtime.layers import backends
from runtime.layers.backends import BOUNDS, LAST_RESORT, Proof
from runtime.linear.fp8 import scaled_mm_rowwise, scaled_mm_unscaled
from runtime.linear.int8 import int_mm
from runtime.linear.module import rescale
from runtime.linear.quantize import FORMATS
from runtime.tuning import USABLE, entries_of, fastest_first, winner
from runtime.tuning_file import Attention, Product, Tiles, today

Tick = Callable[[float], None]
"""Told the share of the part that is done, 0 to 1."""

REPEATS = 5
SAMPLE = 64
"""Rows that are compared with the formula."""

TENSORS = 7
"""Of 16 bits, (tokens, heads, head_dim), that attention takes at the worst: q, k, v, the output, copies in 8
bits of three and what they are made in."""

MARGIN = 0.97
"""Of the usual way's time: less than the noise of a day is no reason to take another."""


@dataclass(frozen=True)
class Size:
    """Queries, keys, heads and the width of one of them."""

    tokens: int
    keys: int
    heads: int
    head_dim: int

    def within(self, free: int) -> "Size":
        """As many tokens as fit in `free` bytes, and of keys no more where they are the same."""
        room = free // (TENSORS * 2 * self.heads * self.head_dim)
        tokens = max(min(self.tokens, room), 1)
        keys = tokens if self.keys == self.tokens else self.keys
        return Size(tokens, keys, self.heads, self.head_dim)


@dataclass(frozen=True)
class Way:
    """One way to multiply: its median, its distance to fp32, or why it does not run.

    engine: whether the engine may take it; the others are shown for comparison.
    """

    name: str
    ms: float | None
    error: float | None
    engine: bool
    trouble: str = ""


@dataclass(frozen=True)
class Multiplied:
    """What was found for one product: what to keep, every way (fastest first), and how many tiles ran."""

    product: Product
    ways: tuple[Way, ...]
    tiles: tuple[tuple[Config, Timing], ...]

    @property
    def operations(self) -> float:
        """Of one product; a multiply and an add are two."""
        return 2.0 * self.product.rows * self.product.columns * self.product.depth


# ----------------------------------------------------------------------------------------------- attention


def attention(
    device: torch.device, size: Size, dtype: torch.dtype, proofs: Sequence[Proof], tick: Tick
) -> Attention:
    """Every backend that `proofs` call right, proven again on some rows at `size` and timed.

    The last resort is not timed: it would take as long as all others together.
    """
    given = backends.inputs(size.tokens, size.keys, size.heads, size.head_dim, dtype, device)
    scale = size.head_dim**-0.5
    some = torch.arange(0, size.tokens, max(size.tokens // SAMPLE, 1), device=device)
    some[-1] = size.tokens - 1
    exact = _exact(given, some, scale)
    found = {proof.name: proof for proof in proofs}
    runs: dict[str, Run] = {}
    usable = [proof.name for proof in proofs if proof.ok and proof.name != LAST_RESORT]
    for number, name in enumerate(usable):
        run = backends.available(name, device)
        found[name] = _at_length(name, run, given, some, exact, size)
        if found[name].ok and run is not None:
            runs[name] = partial(run, *given, scale)
        tick(0.3 * (number + 1) / len(usable))
    _release(device)
    with backends.quiet():
        timings = tune.time_candidates(runs, REPEATS, _ticking(len(runs), REPEATS, tick, 0.3, 1.0))
    tick(1.0)  # what was far behind after one look was not timed again, nor what did not run
    entries = fastest_first(entries_of(found.values(), timings))
    return Attention(
        **asdict(size),
        dtype=str(dtype).removeprefix("torch."),
        date=today(),
        won=winner(entries, size.tokens, size.keys),
        entries=entries,
    )


def _exact(given: tuple[Tensor, Tensor, Tensor], some: Tensor, scale: float) -> Tensor:
    """What the formula gives for some of the queries, fp32: (1, n, H, D)."""
    q, k, v = given
    return backends.math(q[:, some].float(), k, v, scale)


def _at_length(
    name: str,
    run: backends.Run | None,
    given: tuple[Tensor, Tensor, Tensor],
    some: Tensor,
    exact: Tensor,
    size: Size,
) -> Proof:
    """Whether a backend is right at the full length, on some rows."""
    where = f"{size.tokens} on {size.keys} keys"
    if run is None:
        return Proof(name, False, reason="not installed, or not for this GPU")
    try:
        with backends.quiet():
            got = run(*given, size.head_dim**-0.5)[:, some].float()
        distance = float((got - exact).norm() / exact.norm())
    # A missing kernel is an assertion here, a CUDA error or a lack of memory there.
    except Exception as error:  # noqa: BLE001
        return Proof(name, False, reason=f"{where}: {type(error).__name__}: {first_line(error)}")
    bound = BOUNDS[backends.BACKENDS[name].bits]
    if not distance <= bound:  # NaN is above any bound
        return Proof(name, False, distance, f"{where}: {distance:.3f} from fp32, expected {bound} at most")
    return Proof(name, True, distance)


# ------------------------------------------------------------------------------------------------ products


def product(
    device: torch.device, form: str, columns: int, depth: int, rows: int, right: Iterable[str], tick: Tick
) -> Multiplied:
    """The product of `rows` tokens and a weight (columns, depth) of a format ("fp8", "int8").

    right: the ways of `runtime.linear` that are right on this GPU. Where our kernel is one of them, its
    tiles are timed first.
    """
    dtype = FORMATS[form].dtype
    tiles: list[tuple[Config, Timing]] = []
    if "fused" in right:
        number = len(_candidates(device, dtype))
        clock = _ticking(number, 7, tick, 0.0, 0.7)
        tiles = tune.tune_w8a8(rows, columns, depth, dtype, device, clock=clock)
        _release(device)
        tick(0.7)
    best = next((config for config, timing in tiles if timing.milliseconds is not None), None)
    runs, truth = _ways(device, form, (rows, columns, depth), best, set(right))
    errors = {name: _error(run, *truth) for name, run in runs.items()}
    clock = _ticking(len(runs), 2 * REPEATS, tick, 0.7, 1.0)
    timings = tune.time_candidates(runs, 2 * REPEATS, clock)
    tick(1.0)
    usual = ("rowwise", "unscaled") if form == "fp8" else ("fused", "integer")
    ways = tuple(
        Way(one.name, one.milliseconds, errors[one.name], one.name in (*usual, USABLE.get(form)), one.trouble)
        for one in timings
    )
    kept = Product(
        dtype=form,
        columns=columns,
        depth=depth,
        rows=rows,
        date=today(),
        way=_fastest(ways, [name for name in usual if name in runs], USABLE.get(form)),
        tiles=None if best is None else Tiles(**asdict(best)),
        ms={one.name: one.ms for one in ways if one.ms is not None},
    )
    return Multiplied(kept, ways, tuple(tiles))


def _candidates(device: torch.device, dtype: torch.dtype) -> tuple[Config, ...]:
    """The configs that are timed on this GPU."""
    if device.type != "cuda":
        return ()
    return candidates(launch.capability(device), dtype, launch.HAS_DESCRIPTORS)


def _fastest(ways: Sequence[Way], usual: Sequence[str], other: str | None) -> str:
    """The first of the usual ways, or `other` where that is faster by more than noise."""
    times = {one.name: one.ms for one in ways if one.ms is not None}
    first = next((name for name in usual if name in times), None)
    if other in times and (first is None or times[other] < MARGIN * times[first]):
        return other
    return first or "dequantized"


def _ways(
    device: torch.device, form: str, shape: tuple[int, int, int], config: Config | None, right: set[str]
) -> tuple[Mapping[str, Run], tuple[Tensor, Tensor]]:
    """(name -> run, (places, their rows in fp32)) of one product on random numbers."""
    rows, columns, depth = shape
    dtype = FORMATS[form].dtype
    g = torch.Generator(device).manual_seed(rows + columns)
    q, s_a = row_quantize_torch(torch.randn(rows, depth, device=device, generator=g), dtype)
    w, s_w = row_quantize_torch(torch.randn(columns, depth, device=device, generator=g), dtype)
    bias = torch.randn(columns, device=device, generator=g)
    half = bias.bfloat16()
    some = torch.arange(0, rows, max(rows // SAMPLE, 1), device=device)
    exact = w8a8_torch(picked(q, some), w, s_a[some], s_w, bias, torch.float32)

    def fused(fast: bool) -> Tensor:
        assert config is not None
        return w8a8_triton(q, w, s_a, s_w, bias, torch.bfloat16, False, fast, config)

    def rowwise_fast() -> Tensor:
        return torch._scaled_mm(
            *(q, w.t()),
            scale_a=s_a,
            scale_b=s_w.reshape(1, -1),
            bias=half,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    runs: dict[str, Run] = {}
    if form == "fp8":
        runs["rowwise"] = lambda: scaled_mm_rowwise(q, w, s_a, s_w, half)
        runs["rowwise, fast sums"] = rowwise_fast
        runs["unscaled"] = lambda: rescale(scaled_mm_unscaled(q, w), s_a, s_w, bias).to(torch.bfloat16)
    else:
        runs["integer"] = lambda: rescale(int_mm(q, w), s_a, s_w, bias).to(torch.bfloat16)
    runs = {name: run for name, run in runs.items() if name.split(",")[0] in right}
    if config is not None:
        runs["fused"] = partial(fused, False)
        if form == "fp8":
            runs["fused, fast sums"] = partial(fused, True)
    return runs, (some, exact)


def _error(run: Run, some: Tensor, exact: Tensor) -> float | None:
    try:
        got = run()
    except Exception:  # noqa: BLE001 - `time_candidates` meets it again and says why
        return None
    assert isinstance(got, Tensor)
    distance = float((got[some].float() - exact).norm() / exact.norm())
    return distance if math.isfinite(distance) else None


# -------------------------------------------------------------------------------------------------- timing


def _ticking(count: int, repeats: int, tick: Tick, start: float, end: float) -> Callable[[Run], float]:
    """A clock that tells how far the runs are: at most 1 + repeats of each candidate."""
    done, all_of_them = 0, max(count * (1 + repeats), 1)

    def clock(run: Run) -> float:
        nonlocal done
        taken = tune.milliseconds(run)
        done += 1
        tick(start + (end - start) * min(done / all_of_them, 1.0))
        return taken

    return clock


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """GPU memory that tensors can take now."""
    _release(device)
    return torch.cuda.mem_get_info(device)[0]
