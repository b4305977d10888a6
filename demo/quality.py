"""The demo through a fast path, beside the reference path: its score, and how far its latents are off.

    python -m demo.quality --attention cudnn-fp8 --variant fp8 --videos 36

The reference is the bf16 files through the formula of attention in fp32 and kernels in plain torch. Both get
the same noise. On a CPU an 8-bit attention is its twin in plain torch (`demo.eight_bits`), on a card the
backend itself. The exit status is 1 when a bound of this file is exceeded.

All bounds of quality are here: this command, tests/unit/test_quality.py, tests/gpu/measure_quality.py and
docs/quality.md take them from here.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.eight_bits import COMPACT_TWINS, FRACTION, TWINS, Run, use_tensor_core_sums
from demo.evaluate import MODELS
from demo.scenes import HELD_OUT_SCENES, Scene
from demo.score import score_video, shares, table
from demo.train_transformer import LATENT_SHAPE
from runtime import loading
from runtime.checkpoint import load_weights
from runtime.kernels.launch import twins
from runtime.layers import backends
from runtime.layers.attention import Attend, attend
from runtime.layers.compact_qk import MixCompact, QKScales, RunCompact
from runtime.linear import swap_linears
from runtime.loading import DTYPES
from runtime.profiles import load_manifest
from runtime.sampler import SAMPLERS, denoise, draw_noise, schedule
from runtime.text_encoder import TextEncoder
from runtime.tokenizer import PromptTokenizer
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE

# --- the bounds ---

SCORE_POINTS = 2.0
"""How many points of the reference's score (percent of videos that are all right) a path may lose."""


@dataclass(frozen=True)
class Bound:
    """Largest relative RMS distances: that of the median video, of nine in ten, and of the worst."""

    median: float
    most: float
    worst: float

    def __add__(self, other: "Bound") -> "Bound":
        """Of two errors that know nothing of each other; what is the worst of either is that of both."""
        return Bound(
            hypot(self.median, other.median), hypot(self.most, other.most), max(self.worst, other.worst)
        )

    def holds(self, distances: Tensor) -> bool:
        """Whether distances (N,) keep it; NaN does not."""
        most = distances.quantile(0.9, interpolation="lower")
        found = (distances.median(), most, distances.max())
        return all(bool(one <= limit) for one, limit in zip(found, astuple(self), strict=True))


LATENTS = {
    "bf16": Bound(0.02, 0.03, 0.8),
    "fp8": Bound(0.08, 0.1, 0.8),
    "int8": Bound(0.035, 0.05, 0.8),
    "attention in 8 bits": Bound(0.025, 0.04, 0.8),
}
"""Of the demo's latents after four steps from those of the reference, by what computes in eight bits.

The worst is of another kind than the rest: where fresh noise leaves two clips about as likely, a rounding
decides between them. Two clips of one moving scene from different noise are about 1.0 apart.
"""

WIDE = {"bf16": 0.02, "fp8": 0.08, "int8": 0.035, "attention in 8 bits": 0.03}
"""Relative RMS distance of what full-width blocks of random weights add to the tokens from that in fp32."""

SUMS = 2e-3
"""Relative RMS error of the engine's sums of e4m3 products, where terms cancel and where they agree."""


def latents_bound(form: str, attention_bits: int) -> Bound:
    """For a path of the demo: that of its format, and of attention in 8 bits where it is so."""
    bound = LATENTS[form] if form == "bf16" else LATENTS["bf16"] + LATENTS[form]
    return bound + LATENTS["attention in 8 bits"] if attention_bits == 8 else bound


def wide_bound(form: str, attention_bits: int) -> float:
    """For a path through full-width blocks."""
    parts = {"bf16", form} | ({"attention in 8 bits"} if attention_bits == 8 else set())
    return hypot(*(WIDE[part] for part in parts))


# --- the demo, part by part ---


@dataclass(frozen=True)
class Demo:
    """The shipped files of a variant, whole, on a device."""

    tokenizer: PromptTokenizer
    text_encoder: TextEncoder
    transformer: Transformer
    vae: VAE
    device: torch.device
    dtype: torch.dtype


Asked = Sequence[Scene]


def load(variant: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Demo:
    """variant: bf16, fp8 or int8; dtype: of the computation, fp32 on a CPU, bf16 on a card unless given."""
    device = torch.device(device)
    dtype = dtype or DTYPES["fp32" if device.type == "cpu" else "bf16"]
    manifest = load_manifest(MODELS[variant])
    directory = manifest.embedded_directory()
    assert directory is not None
    files = loading.open_files(manifest, directory)
    with loading.on_meta():
        transformer = Transformer(TransformerConfig(**files.transformer.sizes()))
    swap_linears(transformer, files.transformer.quantized_linears())
    load_weights(
        transformer,
        files.transformer,
        dtype=dtype,
        device=device,
        fp32_parameters=Transformer.FP32_PARAMETERS,
    )
    return Demo(
        loading.load_tokenizer(files, manifest),
        loading.load_text_encoder(files.text_encoder, manifest, str(device), dtype),
        transformer.eval().requires_grad_(False),
        loading.load_vae(files.vae, manifest, str(device), dtype, encoder=False),
        device,
        dtype,
    )


def asked(count: int, first: int = 0) -> list[Scene]:
    """`count` of the scenes that training never saw, in turn from the one of number `first`."""
    return [HELD_OUT_SCENES[(first + number) % len(HELD_OUT_SCENES)] for number in range(count)]


class OneByOne:
    """`run` for each video of a batch alone, as in a run of the engine: videos share no scale.

    compact: what takes compact queries and keys, if the backend does: in a run it alone is called.
    """

    def __init__(self, run: Run, compact: RunCompact | None = None) -> None:
        self._run, self._run_compact = run, compact
        self.compact: MixCompact | None = None if compact is None else self._of_compact

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`."""
        rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([self._run(*row, q.shape[-1] ** -0.5) for row in rows])

    def _of_compact(self, q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales) -> Tensor:
        assert self._run_compact is not None
        return self._run_compact(q8, k8, v, scales, q8.shape[-1] ** -0.5, v)


def of_backend(name: str, device: torch.device) -> OneByOne:
    """A backend as a run has it: on a CPU its twin, if it has one. RequestError where it is missing."""
    if device.type == "cpu" and name in TWINS:
        return OneByOne(TWINS[name], COMPACT_TWINS.get(name))
    return OneByOne(backends.named(name, device), backends.BACKENDS[name].compact)


@contextmanager
def attending(demo: Demo, mix: Attend) -> Iterator[None]:
    """Inside, tokens meet each other by `mix`; the text always by torch's attention, in 16 bits or fp32."""
    demo.transformer.use_attention(mix, attend)
    try:
        yield
    finally:
        demo.transformer.use_attention(attend, attend)


@torch.inference_mode()
def make_latents(
    demo: Demo, scenes: Asked, sampler: str, seed: int = 0, steps: int = 4, alone: bool = False
) -> Tensor:
    """Clean latents (B, 16, T, h, w) of scenes, from the same noise on every device.

    alone: each video by itself, as in a run; fused kernels work on no more than one.
    """
    states = torch.cat([_text_states(demo, scene.prompt()) for scene in scenes])  # (B, text_len, text_dim)
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise((len(scenes), *LATENT_SHAPE), generator)

    def velocity_of(latents: Tensor, time: float) -> Tensor:
        some = [(latents, states)]
        if alone:
            some = [*zip(latents.split(1), states.split(1), strict=True)]
        return torch.cat([demo.transformer(x, x.new_full((len(x),), time), text) for x, text in some])

    return [*denoise(velocity_of, noise.to(demo.device), schedule(steps), sampler, generator)][-1]


def _text_states(demo: Demo, prompt: str) -> Tensor:
    """(1, text_len, text_dim), zeros behind the last token."""
    tokens = demo.tokenizer(prompt)
    ids = torch.tensor([tokens.ids[: tokens.n]], device=demo.device)
    states = demo.text_encoder(ids)
    return F.pad(states, (0, 0, 0, len(tokens.ids) - tokens.n))


@torch.inference_mode()
def decode(demo: Demo, latents: Tensor) -> Tensor:
    """Frames (B, F, H, W, 3) uint8 on the CPU of latents (B, 16, T, h, w)."""
    videos = [demo.vae.decode(part.to(demo.dtype), chunked=False).float() for part in latents.split(12)]
    frames = (torch.cat(videos) + 1) * 127.5  # (B, 3, F, H, W)
    return frames.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


def distances(latents: Tensor, reference: Tensor) -> Tensor:
    """Relative RMS distance of each video's latents (B, ...) from the reference's -> (B,) fp64."""
    ours, theirs = (x.double().flatten(1).cpu() for x in (latents, reference))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def score(frames: Tensor, scenes: Asked) -> dict[str, float]:
    """Shares of right attributes of frames (B, F, H, W, 3)."""
    return shares([score_video(video, scene) for video, scene in zip(frames, scenes, strict=True)])


def lost_points(score_of_path: dict[str, float], score_of_reference: dict[str, float]) -> float:
    """Points of the share of videos that are all right."""
    return 100 * (score_of_reference["all"] - score_of_path["all"])


# --- the command line ---


def attention_of(name: str, device: torch.device) -> OneByOne:
    """The backend on a card, once it was proven there; its twin on a CPU. SystemExit for what is neither."""
    if device.type == "cpu":
        if name not in TWINS:
            raise SystemExit(f"--attention {name} has no twin for a CPU; expected one of {', '.join(TWINS)}.")
        return of_backend(name, device)
    proof = backends.prove(name, device) if name in backends.BACKENDS else None
    if proof is None or not proof.ok:
        why = "unknown" if proof is None else proof.reason
        raise SystemExit(f"--attention {name}: {why}; expected one of {', '.join(backends.BACKENDS)}.")
    return of_backend(name, device)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--attention", default="sdpa", help=f"of tokens; on a CPU one of {', '.join(TWINS)}")
    parser.add_argument("--variant", choices=tuple(MODELS), default="bf16")
    parser.add_argument("--sampler", choices=(*SAMPLERS, "both"), default="both")
    parser.add_argument("--videos", type=int, default=36, help="for each sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--sums",
        type=int,
        metavar="BITS",
        help=f"sum FP8 products as tensor cores do, with so many bits ({FRACTION} on Hopper); on a CPU",
    )
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if given.sums is not None and (device.type != "cpu" or given.variant != "fp8"):
        raise SystemExit("--sums is for --variant fp8 on a CPU.")
    mix = attention_of(given.attention, device)
    path = load(given.variant, device)
    reference = path if given.variant == "bf16" else load("bf16", device)
    if given.sums is not None:
        use_tensor_core_sums(path.transformer, given.sums)
    bits = backends.BACKENDS[given.attention].bits
    bound = latents_bound(given.variant, bits)
    samplers = SAMPLERS if given.sampler == "both" else (given.sampler,)
    rows: dict[str, dict[str, float]] = {}
    lost, all_distances, began = [], [], time.monotonic()
    for sampler in samplers:
        scored: list[list[dict[str, bool]]] = [[], []]
        for first in range(0, given.videos, 4):
            scenes, seed = asked(min(4, given.videos - first), first), given.seed + first
            with twins(), attending(reference, OneByOne(backends.math)):
                expected = make_latents(reference, scenes, sampler, seed)
            with attending(path, mix):
                latents = make_latents(path, scenes, sampler, seed, alone=device.type == "cuda")
            all_distances.append(distances(latents, expected))
            for results, frames in zip(
                scored, (decode(path, latents), decode(reference, expected)), strict=True
            ):
                results += [score_video(video, scene) for video, scene in zip(frames, scenes, strict=True)]
        ours, theirs = (shares(results) for results in scored)
        rows |= {f"{given.variant} {given.attention} {sampler}": ours, f"reference {sampler}": theirs}
        lost.append(lost_points(ours, theirs))
    off = torch.cat(all_distances)
    print(table(rows))
    print(f"{given.videos} videos a row, {time.monotonic() - began:.0f} s on {device}")
    most = off.quantile(0.9, interpolation="lower")
    print(f"latents off by {off.median():.4f} (median), {most:.4f} (nine in ten), {off.max():.4f} (worst)")
    print(f"       at most {bound.median:.4f}           {bound.most:.4f}               {bound.worst:.4f}")
    print(f"points lost: {max(lost):.1f}, at most {SCORE_POINTS:g}")
    return int(max(lost) > SCORE_POINTS or not bound.holds(off))


if __name__ == "__main__":
    sys.exit(main())
