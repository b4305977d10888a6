"""The picture in the README: frames of four videos that the shipped checkpoint makes of held-out prompts.

python -m demo.sheet --out docs/samples.png
"""

import argparse
from pathlib import Path

import numpy as np

from demo.scenes import HELD_OUT_SCENES, Scene
from runtime.pipeline import Pipeline
from runtime.video import contact_sheet

SCENES = (
    Scene("triangle", "blue", "right", "black"),
    Scene("circle", "yellow", "down", "white"),
    Scene("square", "cyan", "up", "gray"),
    Scene("triangle", "green", "left", "navy"),
)
assert set(SCENES) <= set(HELD_OUT_SCENES)
COLUMNS = 4


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.sheet", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    pipe = Pipeline.load(model=given.model, device=given.device)
    rows = []
    for seed, scene in enumerate(SCENES):
        print(f"seed {seed}: {scene.prompt()}")
        frames = pipe(scene.prompt(), seed=seed).frames
        rows.append(frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)])
    print(contact_sheet(np.concatenate(rows), given.out, columns=COLUMNS))


if __name__ == "__main__":
    main()
