"""What the steps of right weights stay in: `python -m tests.measure_envelope --model demo` (docs/guard.md).

Prints the ranges over many videos for each sampler; those of a manifest's `envelope` are these, widened.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime import denoising
from runtime.guard import Fault, Numbers, Samples, judge
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.schema import Envelope

PROMPTS = {
    "demo": [
        f"a {colour} {shape} {verb} on a {background} background"
        for colour, shape, verb, background in (
            ("red", "circle", "moves left", "black"),
            ("green", "square", "moves up", "white"),
            ("blue", "triangle", "stays still", "gray"),
            ("yellow", "circle", "moves right", "navy"),
            ("purple", "square", "stays still", "black"),
            ("cyan", "triangle", "moves down", "white"),
        )
    ]
}
Range = tuple[float, float]


@contextmanager
def watched() -> Iterator[list[Numbers]]:
    """The numbers of every step that is judged inside."""
    seen: list[Numbers] = []

    def judged(
        numbers: Sequence[float], envelope: Envelope | None = None, *samples: Samples | float
    ) -> Fault | None:
        seen.append(Numbers(*numbers))
        return judge(numbers, envelope, *samples)  # type: ignore[arg-type]

    usual, denoising.judge = denoising.judge, judged  # type: ignore[assignment]
    try:
        yield seen
    finally:
        denoising.judge = usual


def ranges(seen: Sequence[Numbers]) -> dict[str, Range]:
    """Least and largest of what an envelope bounds."""
    return {
        "velocity": (min(one.velocity for one in seen), max(one.velocity for one in seen)),
        "clean": (min(one.clean for one in seen), max(one.clean for one in seen)),
        "noise": (min(one.noise_low for one in seen), max(one.noise_high for one in seen)),
        "leak": (0.0, max(one.leak for one in seen)),
    }


def main() -> None:
    """Run, and print a line for each sampler and quantity."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--videos", type=int, default=40)
    given = parser.parse_args()
    with Pipeline.load(given.weights, model=given.model) as pipe:
        prompts = PROMPTS.get(pipe.manifest.family, [None])  # None: the model's example, of many seeds
        for sampler in ("lcm", "euler"):
            with watched() as seen:
                for seed in range(given.videos):
                    request = Request(prompt=prompts[seed % len(prompts)], seed=seed, sampler=sampler)
                    for stage in pipe.stages(request):
                        if stage.phase == "denoise" and stage.step == stage.steps:
                            break
            for name, (low, high) in ranges(seen).items():
                print(f"{pipe.manifest.name} {sampler} {name}: {low:.3f} to {high:.3f}", flush=True)
        print(f"fell back: {pipe.ways.fell_back or 'never'}")


if __name__ == "__main__":
    main()
