"""The guard on a card: honest kernels pass with room, samples wait for nothing, bad kernels are found."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import runtime.transformer
from runtime import denoising
from runtime.guard import Fault, judge
from runtime.kernels import launch
from runtime.layers.backends import sdpa
from runtime.pipeline import Pipeline
from runtime.samples import AttentionSample
from runtime.ways import FUSED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
MODELS = ("demo", "demo-fp8", "demo-int8")


@pytest.fixture(params=MODELS)
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.load(model=request.param, device="cuda:0") as opened:
        yield opened


def test_honest_runs_pass_and_how_far_they_are_from_the_bounds(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    worst: dict[str, list[float]] = {"attention": [], "kernels": []}

    def judged(numbers: Any, envelope: Any, attention: Any, a: float, kernels: Any, k: float) -> Fault | None:
        worst["attention"] += [distance for distance, _ in attention]
        worst["kernels"] += [distance for distance, _ in kernels]
        bounds.update(attention=a, kernels=k)
        return judge(numbers, envelope, attention, a, kernels, k)

    bounds: dict[str, float] = {}
    monkeypatch.setattr(denoising, "judge", judged)
    for sampler in ("lcm", "euler"):
        pipe(pipe.manifest.defaults.prompt, sampler=sampler)
    for name, found in worst.items():
        if found:
            print(f"{pipe.manifest.name} {pipe.ways}: {name} {max(found):.4f}, bound {bounds[name]:.3f}")
    assert not pipe.ways.fell_back
    assert worst["kernels"] or pipe.ways.kernels != FUSED


def test_bad_kernels_are_found(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    if pipe.ways.kernels != FUSED:
        pytest.skip("no fused kernels run here")
    right, calls = runtime.transformer.gated_add, itertools.count()

    def shifted(*args: Any) -> torch.Tensor:
        made = right(*args)
        return made if launch._twins_only or next(calls) < 7 else made.roll(1, 1)

    monkeypatch.setattr(runtime.transformer, "gated_add", shifted)
    video = pipe(pipe.manifest.defaults.prompt)
    assert video.metadata["ways"]["kernels"] == "plain" and len(video.metadata["fell_back"]) == 1


def test_a_sample_waits_for_nothing_and_takes_little_time() -> None:
    q, k, v = (torch.randn(1, 32760, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    nothing = torch.empty_like(q)
    sample = AttentionSample(lambda q, k, v: nothing, 16, blocks=40)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the second is warm
        sample.begin(0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            begun.record()
            for _ in range(40):
                sample(q, k, v)
            ended.record()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    print(f"{begun.elapsed_time(ended):.1f} ms for a forward of 40 blocks at 32,760 tokens")
    right = AttentionSample(lambda q, k, v: sdpa(q, k, v, q.shape[-1] ** -0.5), 16)
    right.begin(0)
    right(q, k, v)
    assert float(right.numbers()[:, 0].max()) < right.bound
