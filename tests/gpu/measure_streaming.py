"""What streaming costs: one model, the same forward with its blocks in different places, in one process.

    t2v weights synth DIRECTORY --model wan2.1-t2v-14b-4step-fp8
    python -m tests.gpu.measure_streaming DIRECTORY [--timeline FILE.svg]

Rounds go through all placements in turn; each is timed after a forward that fills its caches. Every velocity
must equal that of the resident blocks, bit for bit. The disk's own speed is measured first, over the same
files.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from runtime.memory.machine import measure_disk
from runtime.memory.plan import Blocks, spread
from runtime.memory.trace import Trace, draw_timeline, overlap
from runtime.pipeline import Pipeline
from runtime.request import Request


def forget(directory: Path) -> None:
    """Have the kernel drop the files' pages, so that a read is the disk's."""
    for file in directory.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", default="wan2.1-t2v-14b-4step-fp8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ram-blocks", type=int, default=11, help="of the placement with little RAM")
    parser.add_argument("--timeline", type=Path)
    given = parser.parse_args()
    forget(given.weights)
    disk = measure_disk(given.weights)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; disk {disk.speed} ({disk.source})")
    request = Request(prompt="a fox", height=480, width=832, frames=81)
    pipe = Pipeline.load(given.weights, model=given.model, request=request, text_known=True)
    assert pipe.plan is not None
    parts, plan = pipe.parts, pipe.plan
    every = tuple(range(plan.inputs.sizes.blocks.count))
    block_bytes = plan.inputs.sizes.blocks.matrices
    some = spread(range(len(every)), given.ram_blocks)
    placements = {
        "resident": Blocks(every, (), 0),
        "all from RAM": Blocks((), every, 2),
        f"{len(some)} from RAM, the rest from disk": Blocks((), some, 2),
        "all from disk": Blocks((), (), 2),
    }
    texts = [torch.randn(1, 512, 4096, device="cuda").bfloat16()]
    latents = torch.randn(1, 16, 21, 60, 104, device="cuda")
    with torch.inference_mode():
        (condition,) = parts.conditions(torch.tensor([[937.5]], device="cuda"), texts)[0]
        times: dict[str, list[float]] = {name: [] for name in placements}
        counts, equal, expected = {}, {}, None
        for round_ in range(given.rounds):
            for name, blocks in placements.items():
                parts.follow(replace(plan, blocks=blocks))
                parts.expect(2)
                if round_ == 0:
                    forget(given.weights)
                parts.transformer.velocity(latents, condition)
                torch.cuda.synchronize()
                before = parts.stream.counts
                if given.timeline and round_ == 0 and name == "all from RAM":
                    parts.stream.trace = trace = Trace(torch.device("cuda"))
                began = time.perf_counter()
                velocity = parts.transformer.velocity(latents, condition)
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
                if parts.stream.trace is not None:
                    parts.stream.trace = None
                    spans = trace.spans()
                    given.timeline.write_text(
                        draw_timeline(spans, "One forward, all blocks streamed from RAM")
                    )
                    print(f"overlap: {overlap(spans):.4f} of the copying is hidden behind computing")
                after = parts.stream.counts
                counts[name] = (
                    after.reads.disk_bytes - before.reads.disk_bytes,
                    after.copied_bytes - before.copied_bytes,
                    after.wait_seconds - before.wait_seconds,
                )
                expected = velocity if expected is None else expected
                equal[name] = equal.get(name, True) and torch.equal(velocity, expected)
    resident = statistics.median(times["resident"])
    print("| blocks | s a forward | to resident | GB read | GB copied | s waited | the same bits |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in times.items():
        read, copied, waited = counts[name]
        median = statistics.median(seconds)
        print(
            f"| {name} | {median:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {median / resident:.3f} | "
            f"{read / 1e9:.2f} | {copied / 1e9:.2f} | {waited:.2f} | {'yes' if equal[name] else 'NO'} |"
        )
    print(
        f"one block {block_bytes / 1e6:.0f} MB; reserved {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB"
    )
    pipe.close()


if __name__ == "__main__":
    main()
