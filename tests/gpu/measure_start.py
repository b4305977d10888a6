"""Where the seconds of a cold start go: from the command to the mp4, on this machine.

    python -m tests.gpu.measure_start [--repeats N] [OPTIONS OF t2v generate]
    python -m tests.gpu.measure_start --model /weights/synth --height 480 --width 832 --frames 81

Four tables. `pieces`: what a start is made of, one piece after the other in a process of their own, each
alone, so what overlaps in a run shows its full price. `run`: `t2v generate --json` as a user starts it, each
event at its second since the command; the first run may find files and compiled kernels cold, the last ones
are what "page cache warm" means. `imports`: what python spends most on before the first byte is read, by
package, without what each imports in turn. `trials`: what `t2v doctor` has a process of its own try, twice.
Without a GPU the pieces that need one are left out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 12  # packages in the table of imports
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)")


class Stopwatch:
    """Seconds of one piece after the other, printed as lines of JSON."""

    def __call__(self, piece: str, run: Callable[[], Any]) -> Any:
        """The result of run(), its time told."""
        began = time.perf_counter()
        result = run()
        print(json.dumps([piece, time.perf_counter() - began]), flush=True)
        return result


def print_pieces(model: str, weights: Path | None, profile_name: str, asked: str) -> None:
    """Every piece of a start, in the order of a run, each waited for."""
    watch = Stopwatch()
    watch("import the program, without torch", lambda: __import__("entrypoint.generate"))
    watch("import numpy and av", lambda: __import__("runtime.video_writer"))

    from runtime.device import gpu_of, inventory, select_device
    from runtime.profiles import find_model, load_profile

    for turn in ("first", "again"):
        watch(f"ask the driver (NVML), {turn}", inventory)
    wanted = watch("read the profile", lambda: load_profile(profile_name))
    profile, device = watch("choose the device", lambda: select_device(asked, wanted))
    manifest, directory = watch("find the model", lambda: find_model(model, profile, weights))
    watch("import torch", lambda: __import__("torch"))
    watch("import the pipeline", lambda: __import__("runtime.pipeline"))

    from runtime import loading
    from runtime.memory.machine import look
    from runtime.provenance import fingerprints

    for turn in ("first", "again"):
        files = watch(f"open the files, {turn}", lambda: loading.open_files(manifest, directory))
    for turn in ("first", "again"):
        watch(f"fingerprints, {turn}", lambda: fingerprints(files.paths))
    watch("look at machine and disk", lambda: look(directory, gpu_of(device), probe_pinning=False))
    watch("tokenizer", lambda: loading.load_tokenizer(files, manifest))
    _print_parts(watch, files, manifest, profile, device)


def _print_parts(watch: Stopwatch, files: Any, manifest: Any, profile: Any, device: str) -> None:
    """What lies on the device: its start, the staging memory, and each model loaded whole."""
    import torch

    from runtime import loading
    from runtime.device import confirm_device
    from runtime.kernels.launch import trouble
    from runtime.memory import allocator
    from runtime.memory.account import CHUNK, CHUNKS
    from runtime.memory.plan import Blocks
    from runtime.memory.ring import Ring

    gpu = device != "cpu"
    dtype, vae_dtype = loading.DTYPES[profile.dtype], loading.DTYPES[profile.vae.dtype]
    if gpu:
        allocator.settle()
        watch("start CUDA", lambda: confirm_device(device))
        watch("its context, the first tensor", lambda: torch.zeros(1, device=device).item())
        watch("first kernel of Triton", lambda: trouble(torch.device(device)))
        matrix = torch.randn(512, 512, device=device, dtype=torch.bfloat16)
        watch("first matrix product", lambda: (matrix @ matrix).float().sum().item())
    ring = watch("ring", lambda: Ring(CHUNK, CHUNKS, gpu, device=device if gpu else None))

    def waited(load: Callable[[], Any]) -> Any:
        loaded = load()
        if gpu:
            torch.cuda.synchronize(device)
        return loaded

    vae = partial(loading.load_vae, files.vae, manifest, device, vae_dtype, encoder=False)
    encoder = partial(loading.load_text_encoder, files.text_encoder, manifest, device, dtype)
    watch("VAE's decoder", lambda: waited(vae))
    watch("text encoder, whole", lambda: waited(encoder))
    every = Blocks(tuple(range(files.transformer.sizes()["num_layers"])), (), 0)
    options = files.transformer, manifest, device, dtype, every, ring
    _, stream = watch("all blocks", lambda: waited(lambda: loading.stream_transformer(*options)))
    watch("close", lambda: (stream.close(), ring.close()))


def python(*arguments: str) -> list[str]:
    """A command line of this Python."""
    return [sys.executable, *arguments]


def environment() -> dict[str, str]:
    """This process's, with this source tree first; packages may lie where PYTHONPATH says."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def print_table(title: str, rows: list[tuple[str, float]]) -> None:
    """Seconds beside words."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}", flush=True)
    for name, seconds in rows:
        print(f"  {name:<{width}}  {seconds:8.3f}", flush=True)


def measure_pieces(options: list[str]) -> None:
    """Run `print_pieces` in a process of its own."""
    began = time.perf_counter()
    subprocess.run(python("-c", "pass"), check=True)
    rows = [("start Python", time.perf_counter() - began)]
    command = python("-m", "tests.gpu.measure_start", "--pieces-only", *options)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    rows += [(name, seconds) for name, seconds in map(json.loads, done.stdout.splitlines())]
    print_table("pieces, each alone: seconds", rows)


def measure_run(options: list[str], number: int) -> None:
    """One `t2v generate --json`: its events, each at its second since the command."""
    with tempfile.TemporaryDirectory() as place:
        target = ["--output", f"{place}/video.mp4", "--json", *options]
        began = time.perf_counter()
        command = python("-m", "entrypoint", "generate", *target)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        at: dict[str, float] = {}
        for line in process.stdout:
            event = json.loads(line)
            if name := _name_of(event):
                at.setdefault(name, time.perf_counter() - began)
        code = process.wait()
        at["process ended"] = time.perf_counter() - began
    if code:
        raise SystemExit(f"the run ended with exit code {code}")
    print_table(f"run {number}: seconds since the command", [*at.items()])


def _name_of(event: dict[str, Any]) -> str | None:
    """What the table calls an event; None for one that it leaves out."""
    phase, step, steps = (event.get(name) for name in ("phase", "step", "steps"))
    if event["event"] == "run":
        return "first checks done, the run file is there"
    if event["event"] == "plan":
        return "plan made"
    if event["event"] == "result":
        return "mp4 named"
    if event["event"] != "stage":
        return None
    if phase == "load":
        return "loaded, but for blocks that come later" if step == steps else "first bytes loaded"
    if phase == "denoise" or step == steps:
        return f"{phase} {step}/{steps}"
    return f"first piece of {phase}" if phase == "decode" and step == 1 else None


def measure_trials(device: str, number: int) -> None:
    """What `t2v doctor` waits for, trial by trial; the first run may find nothing compiled."""
    began = last = time.perf_counter()
    command = python("-m", "entrypoint.kernel_trials", device)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    rows: list[tuple[str, float]] = []
    for line in process.stdout:
        now, found = time.perf_counter(), json.loads(line)
        if "trying" not in found:
            name = found["attention"]["name"] if "attention" in found else f"until {next(iter(found))}"
            rows.append((name, now - last))
        last = now
    process.wait()
    rows += [("until it ended", time.perf_counter() - last), ("all", time.perf_counter() - began)]
    print_table(f"trials {number}: seconds each; ways: torch, CUDA, every 8-bit product", rows)


def measure_imports(options: list[str]) -> None:
    """What is imported before the first byte of weights is read, by package."""
    with tempfile.TemporaryDirectory() as place:
        target = ["--output", f"{place}/video.mp4", *options]
        command = python("-X", "importtime", "-m", "entrypoint", "generate", *target)
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
    spent: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        if line.startswith("load weights"):
            break
        if found := IMPORT_LINE.match(line):
            parts = found[3].split(".")
            spent[".".join(parts[: 2 if parts[0] == "torch" else 1])] += int(found[1])
    if not spent:
        raise SystemExit(f"the run told of no imports: {done.stderr[-500:]}")
    rows = [(name, micros / 1e6) for name, micros in spent.most_common(SHOWN)]
    rows += [("all", sum(spent.values()) / 1e6)]
    print_table("imports before the first byte: seconds (the clock of -X importtime slows them)", rows)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default="wan2.1-t2v-14b-4step")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pieces-only", action="store_true", help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.pieces_only:
        print_pieces(given.model, given.weights, given.profile, given.device)
        return
    options = ["--model", given.model, "--profile", given.profile, "--device", given.device]
    options += [] if given.weights is None else ["--weights", str(given.weights)]
    measure_pieces(options)
    # Without the cache of text states: each run reads its prompt, as the first one does.
    for number in range(1, given.repeats + 1):
        measure_run([*options, "--cache", "none", *rest], number)
    measure_imports([*options, "--cache", "none", *rest])
    for number in (1, 2):
        measure_trials("cuda:0" if given.device == "auto" else given.device, number)


if __name__ == "__main__":
    main()
