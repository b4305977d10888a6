"""On a card: a run that goes on with noise of the GPU's generator, and a signal while its queue is long.

python -m pytest tests/gpu/test_resume_gpu.py -m gpu -s
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from entrypoint.run_file import read_run
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.tiny import PROMPTS, SMALL, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

ROOT = Path(__file__).resolve().parents[2]
QUEUE_SECONDS = 60  # of work that is launched at once; no run may wait for it
PROMPT_EXIT = 10  # seconds from the signal to the end


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of its own: these tests need no conftest."""
    return build(tmp_path_factory.mktemp("tiny") / "weights")


# Each forward from the third on begins with a queue of products that takes a minute.
BUSY = f"""
import itertools, json, sys, time
import torch
from entrypoint.cli import main
from runtime.transformer import Transformer

honest, calls = Transformer.velocity, itertools.count(1)

def busy(*args):
    if next(calls) == 3:
        a = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
        each = (time.perf_counter() - begun) / 10
        # The queue holds about a thousand; one kernel after it waits for all of them.
        size = 900
        many = max(1, int({QUEUE_SECONDS} / each / size))
        print(json.dumps({{"event": "busy", "each": each, "many": many}}), flush=True)
        for _ in range(size * many):
            b = a @ a
        b[0, 0].item()
    return honest(*args)

Transformer.velocity = busy
main()
"""


@pytest.mark.parametrize("noise_device", ["cpu", "cuda"])
@pytest.mark.parametrize("sampler", ["lcm", "euler"])
def test_going_on_with_either_generator(weights: Path, noise_device: str, sampler: str) -> None:
    request = Request(PROMPTS[1], seed=3, sampler=sampler, noise_device=noise_device, **SMALL)
    with Pipeline.load(model=weights / "distill_fp8", device="cuda:0", request=request) as pipe:
        stages = list(pipe.stages(request))
        whole = [copy.deepcopy(stage.point) for stage in stages if stage.point is not None]
        video = stages[-1].video
        assert video is not None and [point.step for point in whole] == [0, 1, 2, 3, 4]
        for start in whole:
            rest = list(pipe.stages(request, start))
            for stage in rest:
                if stage.latents is not None:
                    same = whole[stage.step].latents
                    assert same is not None
                    difference = float((stage.latents - same).abs().max())
                    print(f"{sampler}, {noise_device}: {start.step} -> {stage.step}: {difference}")
                    assert torch.equal(stage.latents, same)
            again = rest[-1].video
            assert again is not None and (again.frames == video.frames).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_does_not_wait_for_the_queue(weights: Path, tmp_path: Path, number: signal.Signals) -> None:
    sizes = [str(part) for name, value in SMALL.items() for part in (f"--{name}", value)]
    model = ["--model", str(weights), "--device", "cuda:0", "--cache", "none", *sizes]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, *model, "--output", "fox.mp4", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert any(json.loads(line)["event"] == "busy" for line in process.stdout)
        time.sleep(2)  # for the queue to fill, so that the program waits for the card
        begun = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=QUEUE_SECONDS)
        seconds = time.monotonic() - begun
    finally:
        process.kill()
    print(f"{number.name}: left after {seconds:.1f} s")
    assert process.returncode == 130 and seconds < PROMPT_EXIT
    assert "t2v resume fox.run.safetensors" in stderr.splitlines()[-1]
    point = read_run(tmp_path / "fox.run.safetensors").point
    assert point is not None and point.step == 2
