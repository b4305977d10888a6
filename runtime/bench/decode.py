"""Latents to checked bytes: the first call of a process at this size, warm, and by the plain twins.

What a first call usually takes the part `cold` tells: here it may be the first on this machine.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from runtime.bench.clock import Run, interleaved, wall
from runtime.bench.samples import Sample
from runtime.bench.scene import Rows, Scene
from runtime.bench.sizes import Size
from runtime.frames import Decoding
from runtime.kernels import launch
from runtime.layers.tiles import Rung
from runtime.vae import VAE
from runtime.ways import FUSED

Computing = Callable[[], AbstractContextManager[None]]
"""Inside, kernels run in one of the ways."""


def measure(scene: Scene, size: Size) -> Rows:
    """The rows of the part `decode` for one size."""
    pipe = scene.pipe(size)
    latents = scene.latents(size)
    with pipe.parts.vae() as vae:
        runs: dict[str, Run] = {"in use": decoder(vae, latents, pipe.rung, pipe.ways.computing)}
        first = wall(runs["in use"], scene.device)  # the warm-up
        if pipe.ways.kernels == FUSED:
            runs["reference"] = decoder(vae, latents, pipe.rung, launch.twins)
            wall(runs["reference"], scene.device)
        with scene.measuring():
            found = interleaved(runs, scene.repeats, scene.device, warm=0)
    row = replace(scene.row("decode", "warm, bytes included", size), unit="s", target="decode")
    yield replace(row, found=found["in use"], reference=found.get("reference"), note=f"rung {pipe.rung.name}")
    once = Sample((first,))
    note = "of this process; on a machine that has not decoded before kernels are compiled in it"
    yield replace(row, what="first call", found=once, target="", note=note)


def decoder(vae: VAE, latents: Tensor, rung: Rung, computing: Computing) -> Callable[[], None]:
    """A decode of latents (1, 16, T, h, w) to bytes that are checked, as the pipeline does it."""

    def run() -> None:
        with computing():
            for _ in Decoding(vae, latents, rung):
                pass

    return run
