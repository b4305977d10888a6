"""The shipped demo checkpoint through the public pipeline: a sample of what `make demo-score` does whole."""

import pytest

from demo.evaluate import MODELS, evaluate
from demo.score import table
from runtime.pipeline import Pipeline
from runtime.profiles import load_manifest
from runtime.schema import project_root

SAMPLE = 4  # videos a row; some five seconds each


@pytest.mark.parametrize(
    ("variant", "sampler", "seed"),
    [("bf16", "lcm", 100), ("bf16", "euler", 209), ("fp8", "lcm", 318), ("int8", "lcm", 427)],
)
def test_prompts_that_training_never_saw_come_out_right(variant: str, sampler: str, seed: int) -> None:
    pipe = Pipeline.load(model=MODELS[variant], device="cpu", profile="cpu")
    row, wrong = evaluate(pipe, SAMPLE, sampler=sampler, seed=seed, first_scene=seed)
    print(table({f"{variant} {sampler}": row}))
    # The bars are .90 and .88 over a hundred videos; of four, one may be wrong.
    assert len(wrong) <= 1, wrong
    assert row["background"] == row["motion"] == row["colour"] == 1.0


def test_all_three_variants_ship_in_forty_megabytes() -> None:
    weights = project_root() / "demo" / "weights"
    size = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file())
    assert 1e6 < size <= 40e6
    for name in MODELS.values():
        manifest = load_manifest(name)
        assert manifest.embedded_directory() == weights
        assert all((weights / sub).is_dir() for sub in manifest.subdirectories)
