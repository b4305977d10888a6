"""What every card would do, pinned: a change of a formula or of a constant shows here, card by card.

Written anew, to be read in the diff, by

    WRITE_SNAPSHOTS=1 python -m pytest tests/unit/test_plan_snapshots.py
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from runtime.errors import PlanError
from runtime.memory import planning
from runtime.memory.plan import Job, Plan
from runtime.memory.planning import plan_run
from runtime.profiles import list_profiles, load_profile, resolve_model
from tests.fake_plans import computer

FILE = Path(__file__).parent / "plans" / "cards.json"
MODEL = "wan2.1-t2v-14b-4step"
SIZES = ((480, 832), (720, 1280))
RAM = (16, 32, 64)  # GiB
CARDS = [name for name in list_profiles() if name != "auto"]  # auto is replaced by one of the others


@pytest.fixture(autouse=True)
def a_process_of_no_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this process holds counts as RAM that it may have, and is another number in every run."""
    monkeypatch.setattr(planning, "STATM", tmp_path / "none")


def summary(plan: Plan) -> str:
    """One line: placement, choices, highest memory, time."""
    blocks = plan.blocks
    stored = plan.inputs.sizes.blocks.count - len(blocks.resident) - len(blocks.cached)
    text = {"resident": "T", "cached": "C"}.get(plan.text, "")
    kept = ((text, text != ""), ("V", plan.vae_stays), ("K", plan.text_kv))
    stays = "".join(mark for mark, there in kept if there)
    leaves = "release" if plan.release_for_decode else "keep"
    return (
        f"{len(blocks.resident)}# {len(blocks.cached)}+ {stored}. slots {blocks.slots} "
        f"slice {plan.token_slice} {plan.rung.name} {leaves} stays {stays or '-'} | "
        f"vram {plan.vram / 2**20:.0f} ram {plan.ram / 2**20:.0f} MiB disk {plan.disk_bytes / 1e9:.1f} GB | "
        f"{plan.total_seconds:.1f} s, denoise by {plan.seconds['denoise'].limit}"
    )


@cache
def planned() -> dict[str, str]:
    """Every card with every size and every amount of RAM, on a machine that is not here."""
    return dict(_planned())


def _planned() -> Iterator[tuple[str, str]]:
    for name in CARDS:
        profile = load_profile(name)
        manifest = resolve_model(MODEL, profile)
        for height, width in SIZES:
            for ram in RAM:
                key = f"{name} {height}x{width}x81 {manifest.quantization} {ram} GiB"
                device = "cpu" if profile.device == "cpu" else "cuda:0"
                machine = computer(ram_available=(ram - 2) * 2**30) if device == "cpu" else None
                try:
                    plan = plan_run(manifest, profile, Job(height, width, 81), machine, device, ram=ram)
                except PlanError as error:
                    yield key, f"no: {error}"
                else:
                    yield key, summary(plan)


def test_every_card_plans_as_it_did() -> None:
    found = planned()
    assert len(found) == len(CARDS) * len(SIZES) * len(RAM)
    if os.environ.get("WRITE_SNAPSHOTS"):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    changed = {key: (kept.get(key), found.get(key)) for key in kept.keys() | found.keys()}
    changed = {key: both for key, both in changed.items() if both[0] != both[1]}
    assert not changed, f"{len(changed)} plans changed; see the file's head for how to accept them: {changed}"


def test_every_gpu_can_make_the_usual_video() -> None:
    """A card of 8 GiB beside 16 of RAM is the least that is promised."""
    for key, line in planned().items():
        if not key.startswith("cpu "):
            assert not line.startswith("no:"), f"{key}: {line}"
