"""Score the shipped checkpoint through the public pipeline, one video at a time.

    python -m demo.evaluate --variant fp8 --sampler euler --prompts 120

Prompts are the held-out combinations in turn, each with a fresh seed. The exit status is 1 when the share of
videos with every attribute right is below `--at-least`.
"""

import argparse
import sys
import time

from demo.scenes import HELD_OUT_SCENES, Scene, held_out_phrase
from demo.score import score_video, shares, table
from runtime.pipeline import Pipeline

MODELS = {"bf16": "demo", "fp8": "demo-fp8", "int8": "demo-int8"}


def evaluate(
    pipe: Pipeline,
    prompts: int,
    *,
    sampler: str,
    steps: int = 4,
    seed: int = 0,
    first_scene: int = 0,
    unseen_phrasing: bool = False,
) -> tuple[dict[str, float], list[tuple[int, Scene]]]:
    """Shares of right attributes over `prompts` videos, and the seed and scene of each wrong one.

    Video i has seed `seed` + i and the held-out scene `first_scene` + i, counted in turn.
    """
    results, wrong = [], []
    for number in range(seed, seed + prompts):
        scene = HELD_OUT_SCENES[(first_scene + number - seed) % len(HELD_OUT_SCENES)]
        prompt = held_out_phrase(scene) if unseen_phrasing else scene.prompt()
        video = pipe(prompt, seed=number, sampler=sampler, steps=steps)
        results.append(score_video(video.frames, scene))
        if not results[-1]["all"]:
            wrong.append((number, scene))
    return shares(results), wrong


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=tuple(MODELS), default="bf16")
    parser.add_argument("--sampler", choices=("lcm", "euler"), default="lcm")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first video")
    parser.add_argument(
        "--unseen-phrasing", action="store_true", help="a word order that training never shows"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SHARE")
    given = parser.parse_args(arguments)
    pipe = Pipeline.load(model=MODELS[given.variant], device=given.device, profile=given.profile)
    started = time.monotonic()
    row, wrong = evaluate(
        pipe,
        given.prompts,
        sampler=given.sampler,
        steps=given.steps,
        seed=given.seed,
        unseen_phrasing=given.unseen_phrasing,
    )
    seconds = (time.monotonic() - started) / given.prompts
    print(table({f"{given.variant} {given.sampler}, {given.prompts} videos on {pipe.device}": row}))
    print(f"{seconds:.2f} s a video with scoring")
    for number, scene in wrong:
        print(f"wrong: seed {number}, {scene.prompt()}")
    return int(row["all"] < given.at_least)


if __name__ == "__main__":
    sys.exit(main())
