"""What each fast path does to a picture: the demo's score and latents, and full-width blocks against fp32.

    python -m tests.gpu.measure_quality [--videos 36] [--seconds 90] [--only demo|wide] [--attention NAMES]

A path is an attention backend, kernels (fused, or their twins in plain torch), a format, and for FP8 whether
`torch._scaled_mm` adds fast. Tables, then each bound of `demo.quality` that was exceeded; the exit status is
1 if any was. Paths are scored until the time is up, the most telling first; what is not scored is judged by
its latents.

Heads of the demo are 128 wide, as the model's, so every 8-bit backend takes them. Its 300 tokens and its
width of 256 are few: errors that grow with the length of a sum show in the second part, at 5,120 and 32,760
tokens, with random weights of the kind that is hard to round (`lifelike`).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from demo import quality
from demo.eight_bits import PROMOTED, tensor_core_sums
from demo.quality import Demo
from demo.scenes import Scene
from demo.score import score_video, shares
from runtime.kernels import launch
from runtime.layers import backends
from runtime.layers.attention import attend
from runtime.linear import LINEAR_CLASSES, QuantizedLinear, fp8, swap_linears
from runtime.linear.quantize import FORMATS, FP8, quantize_rows, quantize_weight
from runtime.sampler import SAMPLERS
from runtime.transformer import Transformer, TransformerConfig

FORMS = ("bf16", "fp8", "int8")
WIDE = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=8)
GRID = (21, 30, 52)  # patches of 480x832x81: 32,760 tokens
DEPTHS = (2, 8)
MATRICES = ("self_attn", "cross_attn", "ffn")


@dataclass(frozen=True)
class Path:
    """One way through the engine."""

    attention: str
    fused: bool
    form: str
    fast: bool = False

    @property
    def name(self) -> str:
        """As the tables have it."""
        kernels = "fused" if self.fused else "plain"
        return f"{self.attention}, {kernels}, {self.form}{', fast sums' if self.fast else ''}"

    @property
    def bits(self) -> int:
        """Of its attention."""
        return backends.BACKENDS[self.attention].bits


REFERENCE = Path("sdpa-math", False, "bf16")


def paths(names: list[str]) -> list[Path]:
    """All of them; each backend, format and kind of kernels appears early, combinations of them later."""
    every = [
        Path(name, fused, form, fast)
        for name in names
        for fused in (True, False)
        for form in FORMS
        for fast in ((False, True) if form == "fp8" else (False,))
    ]

    def rank(path: Path) -> int:
        if path.attention != "sdpa" and path.bits != 8:
            return 2 if path.fused and not path.fast else 4
        return 0 if path.fused and not path.fast else 1 if path.fused or path.attention == "sdpa" else 3

    return sorted((path for path in every if path != REFERENCE), key=rank)


@contextmanager
def following(path: Path) -> Iterator[None]:
    """Inside, kernels and sums are those of the path."""
    before = fp8.FAST_ACCUMULATION
    fp8.FAST_ACCUMULATION = path.fast
    try:
        with nullcontext() if path.fused else launch.twins():
            yield
    finally:
        fp8.FAST_ACCUMULATION = before


def proven(device: torch.device, asked: list[str] | None = None) -> list[str]:
    """The backends of `asked`, or all, that are right here; the others are printed with why not."""
    found = []
    for name in backends.BACKENDS if asked is None else asked:
        proof = backends.prove(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        if proof.ok:
            found.append(name)
        else:
            print(f"  left out: {name}: {proof.reason[:120]}")
    return found


# --- the demo ---


def judge(executor: Executor, frames: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The share of each attribute; scored on other cores, as this one feeds the GPU."""
    return shares(list(executor.map(score_video, [video.numpy() for video in frames], scenes, chunksize=3)))


def of_demo(device: torch.device, names: list[str], videos: int, until: float) -> list[str]:
    """The tables of the demo; returns what exceeds a bound."""
    demos = {form: quality.load(form, device) for form in FORMS}
    scenes, wrong = quality.asked(videos), []
    heads = demos["bf16"].transformer.config
    print(
        f"\nThe demo: {videos} held-out scenes a sampler, heads of {heads.head_dim}, 300 tokens, four steps"
    )
    with ProcessPoolExecutor(8, get_context("spawn")) as executor, ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        expected = {s: latents_of(demos["bf16"], REFERENCE, scenes, s) for s in SAMPLERS}
        best = {s: judge(executor, quality.decode(demos["bf16"], expected[s]), scenes) for s in SAMPLERS}
        known: list[tuple[Tensor, dict[str, float]]] = [(expected[s], best[s]) for s in SAMPLERS]
        print(f"{'path':44} {'sampler':7} {'all':>6} {'median':>8} {'9 in 10':>8} {'worst':>8}")
        for s in SAMPLERS:
            print(f"{'reference: ' + REFERENCE.name:44} {s:7} {best[s]['all']:6.3f}")
        for path in paths(names):
            for s in SAMPLERS:
                latents = latents_of(demos[path.form], path, scenes, s)
                off = quality.distances(latents, expected[s])
                row = next((row for other, row in known if torch.equal(other, latents)), None)
                if row is None and time.monotonic() < until:
                    row = judge(executor, quality.decode(demos["bf16"], latents), scenes)
                    known.append((latents, row))
                said = "  -   " if row is None else f"{row['all']:6.3f}"
                most = off.quantile(0.9, interpolation="lower")
                found = " ".join(f"{one:8.4f}" for one in (off.median(), most, off.max()))
                print(f"{path.name:44} {s:7} {said} {found}", flush=True)
                bound = quality.latents_bound(path.form, path.bits)
                if not bound.holds(off):
                    wrong.append(f"{path.name}, {s}: latents off by {found}; {bound}")
                if row is not None and quality.lost_points(row, best[s]) > quality.SCORE_POINTS:
                    wrong.append(f"{path.name}, {s}: {quality.lost_points(row, best[s]):.1f} points lost")
    return wrong


def latents_of(demo: Demo, path: Path, scenes: list[Scene], sampler: str) -> Tensor:
    """Latents (B, 16, T, h, w) of a path."""
    with following(path), quality.attending(demo, quality.of_backend(path.attention, demo.device)):
        return quality.make_latents(demo, scenes, sampler, seed=1, alone=path.fused)


# --- sums ---


def of_sums(device: torch.device, depths: tuple[int, ...] = (5120, 13824)) -> list[str]:
    """How far sums of FP8 products are off where terms cancel (cosine 0) and where they agree.

    Beside what `demo.eight_bits` expects of Hopper. Without fast accumulation the bound is SUMS.
    """
    wrong = []
    print(f"\n{'sums of':>8} {'cosine':>7} {'fast':>9} {'expected':>9} {'not fast':>9} {'expected':>9}")
    for depth in depths:
        for alike in (0.0, 0.1, 0.3, 1.0):
            generator = torch.Generator().manual_seed(depth)
            weight, x = (torch.randn(64, depth, generator=generator) for _ in range(2))
            x = alike * weight + (1 - alike**2) ** 0.5 * x
            q, w = (quantize_rows(each, FP8)[0] for each in (x, weight))
            exact = (q.double() * w.double()).sum(1)
            found = []
            for fast, promoted in ((True, None), (False, PROMOTED)):
                with following(Path("sdpa", True, "fp8", fast)):
                    card = fp8.scaled_mm_unscaled(q.to(device), w.to(device)).diagonal().cpu().double()
                expected = tensor_core_sums(q, w, promoted=promoted).diagonal().double()
                found += [float((y - exact).norm() / exact.norm()) for y in (card, expected)]
            print(f"{depth:8} {alike:7} " + " ".join(f"{one:9.5f}" for one in found), flush=True)
            if not found[2] <= quality.SUMS:
                wrong.append(f"sums of {depth} products, cosine {alike}: off by {found[2]:.5f}")
    return wrong


# --- full width ---


def lifelike(config: TransformerConfig, device: torch.device, seed: int = 1) -> Transformer:
    """A transformer in fp32 with random weights that make attention as hard as that of a trained model.

    Scores with a deviation of about three, two channels of each head three times the others, keys and values
    with a large common part.
    """
    with torch.device("meta"):
        model = Transformer(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, like in model.state_dict().items():
        noise = torch.randn(like.shape, generator=generator, device=device)
        leaf = name.rpartition(".")[2]
        if "modulation" in name:
            value = 0.3 * noise
        elif like.ndim > 1:
            value = noise * like[0].numel() ** -0.5
        elif "self_attn.norm_" in name:
            value = 1.6 + 0.1 * noise
            value[5 :: config.head_dim] *= 3
            value[config.head_dim // 2 + 13 :: config.head_dim] *= 3
        elif leaf == "weight":
            value = 1 + 0.1 * noise
        else:
            value = noise * {"k": 2.0, "v": 0.5}.get(name.split(".")[-2] if "self_attn" in name else "", 0.05)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


def copy_in(reference: Transformer, form: str) -> Transformer:
    """The model as its files hold it in `form`: block matrices in 8 bits, sensitive parameters in fp32."""
    with torch.device("meta"):
        model = Transformer(reference.config)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and any(m in name for m in MATRICES)
    ]
    if form in LINEAR_CLASSES:
        swap_linears(model, dict.fromkeys(names, form))
    for name, module in model.named_modules():
        source = reference.get_submodule(name)
        if isinstance(module, QuantizedLinear):
            assert isinstance(source, nn.Linear)
            module.weight, module.weight_scale = quantize_weight(source.weight, FORMATS[form])
            module.bias = None if source.bias is None else source.bias.bfloat16()
            continue
        for leaf, parameter in source.named_parameters(recurse=False):
            sensitive = any(part in f"{name}.{leaf}" for part in Transformer.FP32_PARAMETERS)
            value = parameter.data.bfloat16()
            setattr(module, leaf, nn.Parameter(value.float() if sensitive else value, requires_grad=False))
    model.token_slice = reference.token_slice
    return model.eval()


def outputs(
    model: Transformer, given: tuple[Tensor, Tensor, Tensor], depths: tuple[int, ...]
) -> list[Tensor]:
    """What blocks have added to the tokens after each of `depths` blocks, (B, L, D) fp32."""
    states: dict[int, Tensor] = {}

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states[0] = args[0].float().clone()  # blocks write where they read

    def leave(depth: int, _: nn.Module, __: object, out: Tensor) -> None:
        states[depth] = out.float() - states[0]

    hooks = [model.blocks[0].register_forward_pre_hook(enter)]
    hooks += [model.blocks[depth - 1].register_forward_hook(partial(leave, depth)) for depth in depths]
    try:
        with torch.inference_mode():
            model(*given)
    finally:
        for hook in hooks:
            hook.remove()
    return [states[depth] for depth in depths]


def of_full_width(
    device: torch.device,
    names: list[str],
    config: TransformerConfig = WIDE,
    grid: tuple[int, int, int] = GRID,
    depths: tuple[int, ...] = DEPTHS,
) -> list[str]:
    """The table of full-width blocks; returns what exceeds a bound."""
    generator = torch.Generator(device).manual_seed(2)
    shape = (1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    latents = torch.randn(shape, generator=generator, device=device)
    states = torch.randn(1, config.text_len, config.text_dim, generator=generator, device=device)
    states[:, 60:] = 0
    given = (latents, torch.tensor([833.33], device=device), states)
    reference = lifelike(config, device)
    reference.token_slice = 4096
    reference.use_attention(quality.OneByOne(backends.math), attend)
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = grid[0] * grid[1] * grid[2]
    print(
        f"\nDim {config.dim}, {config.num_heads} heads, {tokens} tokens, random weights: distance from fp32"
    )
    with launch.twins():
        expected = outputs(reference, given, depths)
    print(f"{'path':44} " + " ".join(f"{f'{depth} blocks':>9}" for depth in depths))
    wrong = []
    for form in FORMS:
        model = copy_in(reference, form)
        for path in (path for path in paths(names) if path.form == form):
            if path.attention == "sdpa-math" or (not path.fused and path.attention != "sdpa"):
                continue  # the formula is slow at this length; twins of kernels once for each format
            model.use_attention(quality.of_backend(path.attention, device), attend)
            with following(path):
                ours = outputs(model, given, depths)
            off = [float((a - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]
            bound = quality.wide_bound(form, path.bits)
            print(f"{path.name:44} " + " ".join(f"{one:9.4f}" for one in off), flush=True)
            wrong += [
                f"{path.name}: {one:.4f} from fp32 after {depth} blocks; bound {bound:.4f}"
                for one, depth in zip(off, depths, strict=True)
                if not one <= bound  # NaN is above any
            ]
        del model
    return wrong


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=36, help="for each path and sampler")
    parser.add_argument("--seconds", type=float, default=90, help="in all; scoring ends in time for the rest")
    parser.add_argument("--only", choices=("demo", "wide"))
    parser.add_argument("--attention", help="backends, comma-separated; all that are right here unless given")
    given = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda", 0)
    triton = launch.trouble(device) or "works"
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton: {triton}")
    asked = None if given.attention is None else given.attention.split(",")
    names, wrong = proven(device, asked), []
    if given.only != "demo":
        if launch.capability(device) >= launch.LOWEST[launch.E4M3]:
            wrong += of_sums(device)
        wrong += of_full_width(device, names)
        torch.cuda.empty_cache()
        print(f"({time.monotonic() - began:.0f} s so far)")
    if given.only != "wide":
        wrong += of_demo(device, names, given.videos, began + 0.7 * given.seconds)
    print(f"\n{time.monotonic() - began:.0f} s in all; {len(wrong)} bounds exceeded")
    for line in wrong:
        print(f"exceeded: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
