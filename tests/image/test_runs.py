"""What the image does: the demo as anyone, with nothing allowed; refusals in a sentence; signals."""

import json
import os
import time
from pathlib import Path

import pytest

from runtime.video import read_frames, read_metadata
from tests.image.conftest import IMAGE, STRANGER, Bench, Done, docker

GRACE = 20  # seconds from SIGTERM to the end; compose.yaml allows 30
LONG_RUN = ("--model", "demo", "--device", "cpu", "--frames", 49, "--height", 192, "--width", 320)


def owners(directory: Path) -> set[tuple[int, int]]:
    return {(path.stat().st_uid, path.stat().st_gid) for path in directory.rglob("*")}


def test_the_demo_through_compose_as_anyone(bench: Bench) -> None:
    done = bench.compose("run", "--rm", "demo", "--seed", 7, "--output", "circle.mp4", T2V_FPS="12")
    assert done.code == 0, done.stderr
    assert not done.trouble, done.trouble
    assert done.stdout.strip().splitlines()[-1] == "circle.mp4"
    video = bench.outputs / "circle.mp4"
    assert sorted(path.name for path in bench.outputs.iterdir()) == ["circle.mp4"]
    assert owners(bench.outputs) == {STRANGER}
    frames = read_frames(video)
    assert frames.shape == (17, 96, 160, 3) and frames.std() > 1
    metadata = read_metadata(video)
    assert metadata["seed"] == 7 and metadata["fps"] == 12  # one from the arguments, one from the environment
    assert metadata["versions"]["torch"].startswith(
        json.loads(bench.run("version", "--json").stdout)["image"]["torch"]
    )


def test_nothing_is_allowed_that_is_not_needed(bench: Bench) -> None:
    code = """
import os, pathlib
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
denied = []
for place in ("/", "/opt/fourstep", "/weights", "/etc", "/usr/bin"):
    try:
        pathlib.Path(place, "x").write_text("x")
    except OSError:
        denied.append(place)
for place in ("/outputs", "/cache", "/tmp"):
    pathlib.Path(place, "x").write_text("x"); pathlib.Path(place, "x").unlink()
links = sorted(os.listdir("/sys/class/net"))
print(int(status["CapEff"], 16), int(status["NoNewPrivs"]), os.getuid(), *links, *denied)
"""
    capabilities, new_privileges, user, *rest = bench.python(code).split()
    assert (capabilities, new_privileges, user) == ("0", "1", str(STRANGER[0]))
    assert rest == ["lo", "/", "/opt/fourstep", "/weights", "/etc", "/usr/bin"]


def test_without_a_cache_volume_a_cpu_run_loses_nothing_but_time(bench: Bench) -> None:
    flags = [flag for flag in bench.flags() if flag != f"{bench.project}:/cache"]
    at = flags.index("-v", flags.index(f"{bench.weights}:/weights:ro"))
    del flags[at]
    done = docker("run", "--rm", *flags, IMAGE, "--model", "demo", "--device", "cpu", "--output", "plain.mp4")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert read_frames(bench.outputs / "plain.mp4").std() > 1


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not done.stdout


def test_no_gpu_is_told_and_not_waited_for(bench: Bench) -> None:
    (bench.weights / "file").write_text("")
    refused(bench.run("--prompt", "a fox"), 5, "--gpus all", "--device cpu")
    refused(bench.run("--profile", "rtx4070"), 5, "--gpus all")


def test_asking_the_engine_for_a_gpu_that_is_not_there(bench: Bench) -> None:
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}").stdout:
        pytest.skip("this engine has the NVIDIA runtime")
    done = bench.compose("run", "--rm", "t2v", "--profile", "rtx4070")
    assert done.code != 0 and "could not select device driver" in done.stderr  # docs/docker.md explains it


def test_no_weights_are_mounted(bench: Bench) -> None:
    # On a CPU on purpose: without a card that is the only way to come so far.
    refused(
        bench.run("--device", "cpu", "--prompt", "a fox"),
        3,
        "No weights are mounted",
        "docker compose run pull",
    )


def test_outputs_that_belong_to_someone_else(bench: Bench) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a directory that belongs to someone else")
    os.chown(bench.outputs, 0, 0)
    bench.outputs.chmod(0o755)
    refused(
        bench.run("--model", "demo", "--device", "cpu"),
        2,
        "/outputs cannot be written by user 4242:4343",
        "0:0",
    )


def test_too_little_memory(bench: Bench) -> None:
    (bench.weights / "file").write_text("")
    done = bench.run("--device", "cpu", "--prompt", "a fox", flags=("--memory", "2g"))
    if "does not support" in done.stderr:
        pytest.skip("this engine cannot limit memory")
    refused(done, 4, "2.0 GiB of RAM", "memory limit")


def examined(bench: Bench) -> tuple[int, dict[str, str]]:
    """The doctor's exit code, and the state of each finding."""
    done = bench.run("doctor", "--json")
    assert "Traceback" not in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return done.code, {event["name"]: event["state"] for event in events if event["event"] == "finding"}


def test_the_doctor_is_content_where_nothing_fails_and_not_where_something_does(bench: Bench) -> None:
    code, states = examined(bench)
    print(code, states)
    assert states["outputs"] == states["torch"] == states["python"] == "ok"
    assert states["driver"] != "ok" and states["weights"] != "ok"
    assert code == (5 if "fail" in (states["driver"], states["torch"]) else 0)
    if os.getuid() == 0:
        os.chown(bench.outputs, 0, 0)
        bench.outputs.chmod(0o755)
        code, states = examined(bench)
        assert code != 0 and states["outputs"] == "fail"


def test_sigterm_while_denoising(bench: Bench) -> None:
    """`docker stop`: out within the grace period, nothing half-written, and the run can be resumed."""
    name = f"{bench.project}-long"
    started = docker("run", "-d", "--name", name, *bench.flags(), IMAGE, *LONG_RUN, "--output", "long.mp4")
    assert started.returncode == 0, started.stderr
    deadline = time.monotonic() + 300
    while "denoise 1/" not in (log := docker("logs", name).stderr):
        assert time.monotonic() < deadline and docker("ps", "-q", "--filter", f"name={name}").stdout, log
        time.sleep(0.3)
    assert "denoise 4/" not in log, "too fast to be interrupted: make LONG_RUN longer"
    begun = time.monotonic()
    docker("stop", "-t", 60, name)
    took = time.monotonic() - begun
    state = json.loads(docker("inspect", name).stdout)[0]["State"]
    print(f"SIGTERM to exit: {took:.1f} s, code {state['ExitCode']}")
    assert took < GRACE and state["ExitCode"] == 130 and not state["OOMKilled"]
    left = sorted(path.name for path in bench.outputs.iterdir())
    assert "long.mp4" not in left and not [one for one in left if one.startswith(".")]
    bench.run("resume", "/outputs").quiet()
    assert read_frames(bench.outputs / "long.mp4").shape == (49, 192, 320, 3)
    assert owners(bench.outputs) == {STRANGER}
