"""Every attention backend of this machine: time, rate, error and memory, at the lengths of full videos.

    python -m tests.gpu.measure_attention [--tokens 32760 75600] [--heads 40] [--repeats 3]

Medians of interleaved runs in one process, 40 heads of 128 in bf16; under a minute on an H200. The error is
the relative RMS distance to the formula in fp32 over 512 queries from everywhere, all heads, on two kinds of
inputs:

  random     q, k, v normal: the worst for eight bits, as every query averages over almost all keys
  lifelike   channels of q and k that are six times the others, a common mean of k four times its spread, a
             mean in v: what trained models have (SageAttention, arXiv 2410.02367, section 4)

"less mean" is the same distance after the mean over the queries is taken from both, channel by channel: a
large common part of the output hides errors that the picture shows. TFLOP/s count 4·L·S·D for each head. The
memory is that which a run needs beside q, k, v and its output.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.kernels import attention_quantize as passes
from runtime.kernels import launch, tune
from runtime.layers import backends, cudnn_fp8
from tests.gpu.measure_kernels import copy_rate, medians

CUDA = torch.device("cuda", 0)
HEAD = 128
SCALE = HEAD**-0.5
SAMPLE = 512
Inputs = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], object]


def normal(length: int, heads: int, seed: int) -> Tensor:
    g = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(1, length, heads, HEAD, device=CUDA, dtype=torch.bfloat16, generator=g)


def random(length: int, heads: int) -> Inputs:
    """q, k, v (1, L, H, 128) normal."""
    return normal(length, heads, 1), normal(length, heads, 2), normal(length, heads, 3)


def lifelike(length: int, heads: int) -> Inputs:
    """q and k with two outlier channels in every head, k with a large common mean, v with a mean."""
    q, k, v = random(length, heads)
    k += 4 * normal(1, heads, 4)
    v += normal(1, heads, 5)
    for x in (q, k):
        x[..., 5] *= 6
        x[..., 77] *= 6
    return q, k, v


def errors(run: backends.Run, given: Inputs, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(relative, relative less the mean over queries) distance of the sampled rows of a full run."""
    some, exact = truth
    got = run(*given, SCALE)[:, some].float()
    plain = float((got - exact).norm() / exact.norm())
    difference, rest = (x - x.mean(1, keepdim=True) for x in (got - exact, exact))
    return plain, float(difference.norm() / rest.norm())


def truth_of(given: Inputs) -> tuple[Tensor, Tensor]:
    """(places (512,), what the formula gives for these queries, fp32)."""
    q, k, v = given
    length = q.shape[1]
    some = torch.arange(0, length, max(length // SAMPLE, 1), device=CUDA)[:SAMPLE]
    exact = torch.empty((1, len(some), *q.shape[2:]), device=CUDA)
    for head in range(q.shape[2]):
        one = slice(head, head + 1)
        exact[:, :, one] = backends.math(q[:, some, one].float(), k[:, :, one], v[:, :, one], SCALE)
    return some, exact


def memory_of(run: Run) -> int:
    """Bytes at the worst moment of a run beyond those before it and its result's."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    out = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(CUDA)
    size = out.numel() * out.element_size() if isinstance(out, Tensor) else 0
    return peak - before - size


def table(tokens: int, heads: int, repeats: int, names: list[str]) -> None:
    """One line for each backend at this length."""
    kinds = {}
    given = random(tokens, heads)
    runs = {name: backends.named(name, CUDA) for name in names}
    for kind, make in (("random", random), ("lifelike", lifelike)):
        given = make(tokens, heads)
        truth = truth_of(given)
        kinds[kind] = {name: errors(run, given, truth) for name, run in runs.items()}
        del truth
    timed: dict[str, Run] = {name: lambda run=run: run(*given, SCALE) for name, run in runs.items()}
    timings = tune.time_candidates(timed, repeats)
    print(f"\n{tokens} tokens, {heads} heads of {HEAD} (errors: relative, less mean)")
    print(f"{'backend':16} {'ms':>8} {'TFLOP/s':>8} {'random':>15} {'lifelike':>15} {'MiB more':>9}")
    for timing in timings:
        if timing.milliseconds is None:
            print(f"{timing.name:16} {timing.trouble[:90]}")
            continue
        rate = 4 * tokens * tokens * heads * HEAD / timing.milliseconds / 1e9
        found = " ".join("{:>7.4f} {:>7.4f}".format(*kinds[kind][timing.name]) for kind in kinds)
        more = memory_of(timed[timing.name]) / 2**20
        print(f"{timing.name:16} {timing.milliseconds:8.2f} {rate:8.0f} {found} {more:9.0f}")


def around_cudnn(tokens: int, heads: int, repeats: int, rate: float) -> None:
    """The passes before and after cuDNN's FP8 attention, alone, against the bytes they must move."""
    q, k, v = lifelike(tokens, heads)
    n = q.numel()
    found = passes.spread(k)
    factor = torch.full_like(found.mean, 0.1)
    eight = passes.to_eight_bits(v, found.mean, factor, rotate=False)
    cases: dict[str, tuple[int, Run]] = {
        "spread": (2 * n, lambda: passes.spread(k)),
        "to_eight_bits, rotated": (3 * n, lambda: passes.to_eight_bits(k, found.mean, factor, rotate=True)),
        "to_eight_bits": (3 * n, lambda: passes.to_eight_bits(v, found.mean, factor, rotate=False)),
        "restore from e4m3": (3 * n, lambda: passes.restore(eight, factor, found.mean, torch.bfloat16)),
        "q, k and v, all of it": (15 * n, lambda: passes.quantize(q, k, v)),
    }
    print(f"\naround cudnn-fp8 at {tokens} tokens{'':14} {'ms':>7} {'floor':>7} {'of floor':>8}")
    for name, ms in medians({name: run for name, (_, run) in cases.items()}, 5 * repeats).items():
        floor = cases[name][0] / rate
        print(f"  {name:43} {ms:7.3f} {floor:7.3f} {floor / ms:8.0%}")
    if cudnn_fp8.find((9, 0)) is not None:
        given = passes.quantize(q, k, v)

        def alone() -> Tensor:
            return cudnn_fp8.product(given.q, given.k, given.v, given.descale, SCALE, q.dtype)

        for name, ms in medians({"cuDNN alone": alone}, repeats).items():
            written = alone().dtype
            rate = 4 * tokens * tokens * heads * HEAD / ms / 1e9
            print(f"  {name:43} {ms:7.3f} {rate:7.0f} TFLOP/s, output {written}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 75600])
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    began = time.perf_counter()
    version = getattr(cudnn_fp8.frontend(), "__version__", "missing")
    print(
        torch.cuda.get_device_name(CUDA), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version()
    )
    print("Triton:", launch.trouble(CUDA) or "works", "| cudnn-frontend", version)
    right = []
    for name in backends.BACKENDS:
        start = time.perf_counter()
        proof = backends.prove(name, CUDA)
        seconds = time.perf_counter() - start
        state = "right" if proof.ok else "no"
        print(f"  {name:16} {state:5} {proof.distance:.4f} {seconds:5.1f} s {proof.reason[:140]}")
        right += [name] if proof.ok and name != "sdpa-math" else []
    for keys in (None, 512):
        choice = backends.choose(CUDA, 32760, keys)
        times = ", ".join(f"{t.name} {t.milliseconds:.2f}" for t in choice.timings if t.milliseconds)
        print(f"chosen for {keys or 'its own'} keys: {backends.rungs(choice, CUDA)} by ms {times}")
    rate = copy_rate()
    around_cudnn(options.tokens[0], options.heads, options.repeats, rate)
    for tokens in options.tokens:
        torch.cuda.empty_cache()
        table(tokens, options.heads, options.repeats, right)
        print(f"({time.perf_counter() - began:.0f} s so far)", flush=True)


if __name__ == "__main__":
    main()
