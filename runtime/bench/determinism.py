"""The same seed twice, for every placement of the weights: the same frames, bit for bit, or it is a fault."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from runtime.bench.samples import Row, Sample
from runtime.bench.scene import Rows, Scene
from runtime.bench.sizes import Size
from runtime.memory.plan import Blocks, Plan, spread
from runtime.pipeline import Pipeline

PROMPT = "A red fox runs in the snow at night."
TWICE = 2


def measure(scene: Scene, size: Size) -> Rows:
    """A row for each placement, and one that compares them all; `right` says whether the bits agree."""
    pipe = scene.pipe(size)
    plan = pipe.plan
    assert plan is not None  # as `Pipeline.load` makes one
    digests: dict[str, str] = {}
    for name, blocks in placements(plan):
        row = scene.row("determinism", name, size)
        trouble = too_much(plan, blocks)
        if trouble:
            yield replace(row, note=trouble)
            continue
        _place(pipe, replace(plan, blocks=blocks))
        found = [_digest(pipe, size) for _ in range(TWICE)]
        digests[name] = found[0][0]
        yield _judged(row, {digest for digest, _ in found}, Sample(tuple(seconds for _, seconds in found)))
    _place(pipe, plan)
    row = scene.row("determinism", "all placements", size)
    if len(digests) > 1:
        yield _judged(row, set(digests.values()), None)


def placements(plan: Plan) -> Iterator[tuple[str, Blocks]]:
    """Resident, all from RAM, mixed (a third each of resident, cached and stored); and the plan's own."""
    count = plan.inputs.sizes.blocks.count
    every = tuple(range(count))
    third = max(count // 3, 1)
    resident = spread(range(count), third)
    others = [index for index in every if index not in resident]
    cached = spread(others, min(third, len(others)))
    offered = {
        "resident": Blocks(every, (), 0),
        "all from RAM": Blocks((), every, min(2, count)),
        "mixed": Blocks(resident, cached, min(2, max(len(others), 1))),
    }
    known = offered.values()
    if plan.blocks not in known:
        yield "as planned", plan.blocks
    yield from offered.items()


def too_much(plan: Plan, blocks: Blocks) -> str:
    """Why the machine cannot hold these blocks beside what the plan has; "" where it can."""
    matrices, cuda = plan.inputs.sizes.blocks.matrices, plan.device == "cuda"

    def computing(one: Blocks) -> int:
        """Blocks in the memory that computes."""
        return len(one.resident) + one.slots

    def waiting(one: Blocks) -> int:
        """Blocks in RAM."""
        return len(one.cached) if cuda else len(one.cached) + computing(one)

    more = computing(blocks) - computing(plan.blocks)
    if cuda and plan.vram + more * matrices > plan.budget.vram:
        return "not measured: its blocks do not fit the GPU's memory"
    more = waiting(blocks) - waiting(plan.blocks)
    if plan.ram + more * matrices > plan.budget.ram:
        return "not measured: its blocks do not fit the RAM"
    return ""


def _place(pipe: Pipeline, plan: Plan) -> None:
    pipe.fitting.plan = plan
    pipe.parts.follow(plan)


def _digest(pipe: Pipeline, size: Size) -> tuple[str, float]:
    """sha256 of the frames of one run, and its seconds."""
    stages = list(pipe.stages(size.request(PROMPT)))
    video = stages[-1].video
    assert video is not None  # the last stage of a run that did not raise
    return hashlib.sha256(video.frames.tobytes()).hexdigest(), stages[-1].seconds


def _judged(row: Row, digests: set[str], seconds: Sample | None) -> Row:
    right = len(digests) == 1
    shown = ", ".join(sorted(digest[:12] for digest in digests))
    words = "the same bits" if right else "DIFFERENT bits"
    return replace(row, unit="s" if seconds else "", found=seconds, right=right, note=f"{words}: {shown}")
