"""When nothing fits: the smallest changes that would, each with its numbers, in one sentence.

GPU memory is told as people know it, with what CUDA itself takes; a budget is without.
"""

from collections.abc import Mapping
from dataclasses import replace

from runtime.memory.account import Inputs, Wish
from runtime.memory.choose import DoesNotFitError, choose
from runtime.memory.costs import CUDA_CONTEXT
from runtime.memory.sizes import ModelSizes

SMALLER = ((720, 1280), (576, 1024), (480, 832), (384, 672), (320, 576), (256, 448), (192, 336), (96, 160))
"""Heights and widths to fall back to: the two sizes of the models' training, and what lies below, near
16:9."""

DOING = {"text": "encode the text", "entry": "begin the denoising", "denoise": "denoise", "decode": "decode"}


def sentence(inputs: Inputs, fault: DoesNotFitError, alternatives: Mapping[str, ModelSizes]) -> str:
    """What is short, by how much, and what would fit. `fault` is the first thing that is short."""
    budget, job = inputs.budget, inputs.job
    have, source = (
        (budget.vram, budget.vram_source) if fault.what == "vram" else (budget.ram, budget.ram_source)
    )
    there = _down(have + _beside(fault.what)) + (f" ({source})" if source else "")
    ways = ", or ".join([*_changes(inputs, alternatives), _more(inputs)])
    return (
        f"A video of {job} with {inputs.sizes.quantization} weights needs at least "
        f"{_named(fault.what, fault.needed)} to {DOING[fault.phase]}, and there are {there}; what would fit: "
        f"{ways}."
    )


def _beside(what: str) -> int:
    """What the budget leaves out."""
    return CUDA_CONTEXT if what == "vram" else 0


def _named(what: str, needed: int) -> str:
    name = {"vram": "GPU memory", "ram": "RAM"}[what]
    return f"{_up(needed + _beside(what))} of {name}"


def _changes(inputs: Inputs, alternatives: Mapping[str, ModelSizes]) -> list[str]:
    """Fewer frames, a smaller picture, another variant; at most one of each, of those that fit."""
    job = inputs.job
    found = []
    frames = _most_frames(inputs)
    if frames is not None:
        found.append(f"--frames {frames}")
    for size in SMALLER:
        height, width = size if job.width >= job.height else size[::-1]
        smaller = replace(job, height=height, width=width)
        if height * width < job.height * job.width and _missing(replace(inputs, job=smaller)) is None:
            found.append(f"--height {height} --width {width}")
            break
    for name, sizes in alternatives.items():
        if _missing(replace(inputs, sizes=sizes)) is None:
            found.append(f"--model {name}")
            break
    return found


def _most_frames(inputs: Inputs) -> int | None:
    """The most frames (4n+1) below the job's that fit; None if not even one does."""

    def fits(n: int) -> bool:
        return _missing(replace(inputs, job=replace(inputs.job, frames=4 * n + 1))) is None

    low, high = -1, (inputs.job.frames - 1) // 4 - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low < 0 else 4 * low + 1


def _missing(inputs: Inputs) -> DoesNotFitError | None:
    """Why there is no plan; None if there is one."""
    try:
        choose(inputs, Wish())
    except DoesNotFitError as fault:
        return fault
    return None


def _more(inputs: Inputs) -> str:
    """The memory with which there would be a plan for the job as it is."""
    added: dict[str, int] = {}
    enough = inputs
    while (fault := _missing(enough)) is not None:
        added[fault.what] = fault.needed
        budget = enough.budget
        if fault.what == "vram":
            budget = replace(budget, vram=fault.needed)
        else:
            budget = replace(budget, ram=fault.needed)
        enough = replace(enough, budget=budget)
    return " and ".join(_named(what, needed) for what, needed in added.items())


def _up(nbytes: int) -> str:
    # Up for what is needed and down for what is there: a near miss must not read as if it fitted.
    return f"{-(-nbytes * 100 // 2**30) / 100:.2f} GiB"


def _down(nbytes: int) -> str:
    return f"{nbytes * 100 // 2**30 / 100:.2f} GiB"
