"""Every kernel against its twin and against the bytes that it must move; the 8-bit product against torch's.

    python -m tests.gpu.measure_kernels [--rows 32760] [--only rows|compact|product]

Medians of interleaved runs in one process, random inputs (zeros run faster); under a minute on an H200.
The floor of an element-wise kernel is its bytes (each input read once, each output written once) over what
a large copy reaches here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from runtime.kernels import launch, tune
from runtime.kernels.attention_quantize import to_eight_bits_triton
from runtime.kernels.gated_add import gated_add_torch, gated_add_triton
from runtime.kernels.gelu_quantize import gelu_quantize_torch, gelu_quantize_triton
from runtime.kernels.launch import E4M3
from runtime.kernels.norm_quantize import (
    Modulation,
    Residual,
    Rms,
    norm_quantize_torch,
    norm_quantize_triton,
    norm_triton,
)
from runtime.kernels.norm_silu import norm_silu_torch, norm_silu_triton
from runtime.kernels.rms_rope import rms_rope_torch, rms_rope_triton
from runtime.kernels.rms_rope_quantize import rms_rope_quantize_torch, rms_rope_quantize_triton
from runtime.kernels.row_quantize import row_quantize_torch, row_quantize_triton
from runtime.linear.fp8 import scaled_mm_rowwise
from runtime.linear.int8 import int_mm
from runtime.linear.module import rescale
from tests.kernel_cases import NormedHeads, normed_heads

CUDA = torch.device("cuda", 0)
WIDTH, WIDE = 5120, 13824
PRODUCTS = ((5120, 5120), (13824, 5120), (5120, 13824))  # (N, K)
Run = Callable[[], object]
Case = tuple[str, int, dict[str, Run], Run]  # name, bytes that must move, variants, twin


def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Milliseconds of each, interleaved, after one untimed run; what cannot run is left out, with a word."""
    working = {}
    for name, run in runs.items():
        try:
            run()
            working[name] = run
        except Exception as error:  # noqa: BLE001  (an older card or Triton lacks some)
            print(f"  {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    times: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(repeats):
        for name, run in working.items():
            times[name].append(tune.milliseconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


# warps and rows of a norm's program
IN_TURN = [(4, 1), (8, 1), (8, 2), (8, 4), (8, 8), (4, 4), (16, 2), (16, 4)]


def copy_rate() -> float:
    """Bytes per millisecond, read plus written, of a copy of 1 GiB."""
    source = torch.randn(2**28, device=CUDA)
    target = torch.empty_like(source)
    best = medians({"copy": lambda: target.copy_(source)}, 9)["copy"]
    return 2 * source.numel() * source.element_size() / best


def row_kernels(rows: int, repeats: int) -> None:
    """The table of the element-wise kernels."""
    g = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(rows, WIDTH, device=CUDA, generator=g).bfloat16()
    branch = torch.randn(rows, WIDTH, device=CUDA, generator=g).bfloat16().mul_(1e-3)
    h = torch.randn(rows, WIDE, device=CUDA, generator=g).bfloat16()
    one, two, gate = (torch.randn(WIDTH, device=CUDA, generator=g) for _ in range(3))
    angles = torch.rand(rows, 1, 64, device=CUDA, generator=g)
    table = (angles.cos(), angles.sin())
    scaling, residual = Modulation(one, two), Residual(branch, gate)
    n, f = rows * WIDTH, rows * WIDE
    cases: list[Case] = []
    for name, form in (("int8", torch.int8), ("e4m3", E4M3)):
        cases += [
            (
                f"row_quantize 5120 {name}",
                3 * n,
                {f"w{w}": partial(row_quantize_triton, x, form, w) for w in (4, 8, 16)},
                partial(row_quantize_torch, x, form),
            ),
            (
                f"row_quantize 13824 {name}",
                3 * f,
                {f"w{w}": partial(row_quantize_triton, h, form, w) for w in (8, 16, 32)},
                partial(row_quantize_torch, h, form),
            ),
            (
                f"norm_quantize {name}",
                3 * n,
                {
                    f"w{w} r{r}": partial(norm_quantize_triton, x, scaling, 1e-6, form, None, w, r)
                    for w, r in IN_TURN
                },
                partial(norm_quantize_torch, x, scaling, 1e-6, form),
            ),
            (
                f"residual + norm_quantize {name}",
                7 * n,
                {
                    f"w{w} r{r}": partial(norm_quantize_triton, x, scaling, 1e-6, form, residual, w, r)
                    for w, r in IN_TURN
                },
                partial(norm_quantize_torch, x, scaling, 1e-6, form, residual),
            ),
            (
                f"gelu_quantize 13824 {name}",
                3 * f,
                {f"w{w}": partial(gelu_quantize_triton, h, form, None, w) for w in (8, 16, 32)},
                partial(gelu_quantize_torch, h, form),
            ),
        ]
    cases += [
        (
            "residual + norm (bf16 out)",
            8 * n,
            {f"w{w} r{r}": partial(norm_triton, x, scaling, 1e-6, residual, w, r) for w, r in IN_TURN},
            lambda: None,
        ),
        (
            "rms_rope",
            4 * n,
            {f"w{w}": partial(rms_rope_triton, x, one, 1e-6, 128, table, None, w) for w in (4, 8, 16)},
            partial(rms_rope_torch, x, one, 1e-6, 128, table),
        ),
        (
            "rms (no rope)",
            4 * n,
            {f"w{w}": partial(rms_rope_triton, x, one, 1e-6, 128, None, None, w) for w in (4, 8, 16)},
            partial(rms_rope_torch, x, one, 1e-6, 128),
        ),
        (
            "gated_add",
            6 * n,
            {"": partial(gated_add_triton, x, branch, gate)},
            partial(gated_add_torch, x, branch, gate),
        ),
    ]
    cases += norm_silu_cases(g)
    if launch.capability(CUDA) >= launch.LOWEST[E4M3]:
        cases += text_cases(g)
    table_of(cases, rows, repeats)


def compact_kernels(rows: int, repeats: int) -> None:
    """The table of what makes q and k compact, and of two passes in its place, also for slices of rows."""
    cases: list[Case] = []
    for count in (rows, 11008, 5632):
        given = normed_heads((1, count), 40, 128, torch.bfloat16, True, True, "cuda")
        place, factor = torch.empty_like(given.x), given.factor[:, None].expand(40, 128).contiguous()
        for name, one in (("q", given._replace(center=None)), ("k", given)):
            center = torch.zeros_like(factor) if one.center is None else one.center
            variants: dict[str, Run] = {"in two": partial(in_two_passes, one, place, factor, center)}
            variants["in one"] = partial(rms_rope_quantize_triton, *one.arguments)
            twin = partial(rms_rope_quantize_torch, *one.arguments)
            cases.append((f"compact {name} {count}", 3 * place.numel(), variants, twin))
    table_of(cases, rows, repeats)


def in_two_passes(given: NormedHeads, place: Tensor, factor: Tensor, center: Tensor) -> Tensor:
    """What `rms_rope_quantize` does, by way of 16 bits in `place`; factor and center (H, D)."""
    n = rms_rope_triton(given.x, given.weight, given.eps, given.head_dim, given.table, place)
    return to_eight_bits_triton(n.unflatten(-1, factor.shape), center, factor, True)


def table_of(cases: list[Case], rows: int, repeats: int) -> None:
    """Milliseconds of each variant beside the floor by its bytes and the twin."""
    rate = copy_rate()
    print(f"\nrows {rows}; a copy of 1 GiB moves {rate / 1e9:.2f} TB/s")
    print(f"{'kernel':34} {'ms':>7} {'floor':>7} {'of floor':>8} {'TB/s':>6} {'twin ms':>8} {'ratio':>6}")
    for name, nbytes, kernels, twin in cases:
        times = medians({**kernels, "twin": twin}, repeats)
        twin_ms = times.pop("twin")
        for variant, ms in times.items():
            floor = nbytes / rate
            line = f"{ms:7.3f} {floor:7.3f} {floor / ms:8.0%} {nbytes / ms / 1e9:6.2f} {twin_ms:8.3f}"
            print(f"{name + ' ' + variant:34} {line} {twin_ms / ms:6.1f}")


def text_cases(g: torch.Generator) -> list[Case]:
    """The row kernels of the text encoder, for a prompt of full length."""
    tokens, width, wide = 512, 4096, 10240
    x, branch = (torch.randn(tokens, width, device=CUDA, generator=g).bfloat16() for _ in range(2))
    h, factor = (torch.randn(tokens, wide, device=CUDA, generator=g).bfloat16() for _ in range(2))
    scaling, residual = (
        Rms(torch.randn(width, device=CUDA, generator=g).bfloat16()),
        Residual(branch.mul_(1e-3)),
    )
    norms: dict[str, Run] = {
        f"w{w} r{r}": partial(norm_quantize_triton, x, scaling, 1e-6, E4M3, residual, w, r)
        for w, r in ((2, 1), (4, 1), (8, 1), (2, 4), (4, 4))
    }
    gelus: dict[str, Run] = {f"w{w}": partial(gelu_quantize_triton, h, E4M3, factor, w) for w in (8, 16, 32)}
    plain_norm = partial(norm_quantize_torch, x, scaling, 1e-6, E4M3, residual)
    plain_gelu = partial(gelu_quantize_torch, h, E4M3, factor)
    return [
        ("residual + rms_quantize, text", 7 * tokens * width, norms, plain_norm),
        ("gelu·factor quantize, text", 5 * tokens * wide, gelus, plain_gelu),
    ]


def norm_silu_cases(g: torch.Generator) -> list[Case]:
    """One frame at each resolution of the decoder, in both layouts."""
    cases: list[Case] = []
    for channels, height, width in ((96, 480, 832), (192, 240, 416), (384, 120, 208)):
        first = torch.randn(4, channels, height, width, device=CUDA, generator=g).bfloat16()
        gamma = torch.randn(channels, device=CUDA, generator=g)
        for name, x in (("first", first), ("last", first.contiguous(memory_format=torch.channels_last))):
            kernel, twin = (partial(f, x, gamma) for f in (norm_silu_triton, norm_silu_torch))
            cases.append((f"norm_silu {channels} channels {name}", 4 * x.numel(), {"": kernel}, twin))
    return cases


def theirs(form: torch.dtype, q: Tensor, w: Tensor, s_a: Tensor, s_w: Tensor, bias: Tensor) -> dict[str, Run]:
    """The same product by torch."""
    if form == torch.int8:
        return {
            "torch._int_mm alone": lambda: int_mm(q, w),
            "torch._int_mm + rescale": lambda: rescale(int_mm(q, w), s_a, s_w, bias).to(torch.bfloat16),
        }
    half = bias.bfloat16()
    scaled = partial(torch._scaled_mm, q, w.t(), scale_a=s_a, scale_b=s_w.t(), bias=half)
    return {
        "torch._scaled_mm": lambda: scaled_mm_rowwise(q, w, s_a, s_w, half),
        "torch._scaled_mm fast": lambda: scaled(out_dtype=torch.bfloat16, use_fast_accum=True),
    }


def products(rows: int) -> None:
    """The table of the 8-bit products."""
    for form in (torch.int8, E4M3):
        if launch.capability(CUDA) < launch.LOWEST[form]:
            print(f"\n{form}: not on this card")
            continue
        for columns, depth in PRODUCTS:
            operations = 2 * rows * columns * depth
            print(f"\n{form} {rows} x {depth} -> {columns}: {'ms':>7} {'T/s':>6}")
            g = torch.Generator(CUDA).manual_seed(1)
            q, w = (tune._random(shape, form, g) for shape in ((rows, depth), (columns, depth)))
            s_a, s_w = (
                torch.rand(count, 1, device=CUDA, generator=g).mul_(depth**-0.5) for count in (rows, columns)
            )
            bias = torch.randn(columns, device=CUDA, generator=g)
            for name, ms in medians(theirs(form, q, w, s_a, s_w, bias), 9).items():
                print(f"  {name:40} {ms:7.3f} {operations / ms / 1e9:6.0f}")
            del q, w
            for fast in (False, True) if form == E4M3 else (False,):
                began = time.perf_counter()
                found = tune.tune_w8a8(rows, columns, depth, form, CUDA, fast)
                for config, timing in found:
                    name = f"{config}{' fast' if fast else ''}"
                    if timing.milliseconds is None:
                        print(f"  {name:40} {timing.trouble[:110]}")
                    else:
                        rate = operations / timing.milliseconds / 1e9
                        print(f"  {name:40} {timing.milliseconds:7.3f} {rate:6.0f}")
                print(f"  ({time.perf_counter() - began:.1f} s to tune)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32760)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=("rows", "compact", "product"))
    options = parser.parse_args()
    began = time.perf_counter()
    print(torch.cuda.get_device_name(CUDA), torch.__version__, "triton", launch.triton.__version__)
    if options.only in (None, "rows"):
        row_kernels(options.rows, options.repeats)
    if options.only in (None, "compact") and launch.capability(CUDA) >= launch.LOWEST[E4M3]:
        compact_kernels(options.rows, options.repeats)
    if options.only in (None, "product"):
        products(options.rows)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
