"""The workflows: pinned, bounded, least privileges, no injection; and their scripts do what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fake_machine import FakeMachine

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINS = ROOT / ".github" / "pins.py"
MAKEFILE = (ROOT / "Makefile").read_text()
SMOKE = ROOT / ".github" / "gpu-smoke.sh"


def load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), yaml.BaseLoader)  # `on` stays a word


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return load(path)["jobs"]


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job["steps"]


def script(workflow: str, name: str) -> str:
    """The script of the step of this name."""
    path = ROOT / ".github" / "workflows" / f"{workflow}.yml"
    return next(step["run"] for step in steps(path) if step.get("name") == name)


each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


# --- every workflow ---------------------------------------------------------------------------------------


@each
def test_actions_are_pinned_by_commit_and_say_which_version(path: Path) -> None:
    used = re.findall(r"uses: *(\S+)(.*)$", path.read_text(), flags=re.M)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}{comment}"


def test_one_action_has_one_version() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, pin in re.findall(r"uses: *(\S+)@(.*)$", path.read_text(), flags=re.M):
            pins.setdefault(name, set()).add(pin)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}


@each
def test_permissions_are_given_job_by_job(path: Path) -> None:
    assert load(path)["permissions"] == {}
    for name, job in jobs(path).items():
        assert "permissions" in job, name
        if path.stem != "publish":
            assert job["permissions"] == {"contents": "read"}, name
    assert "write-all" not in path.read_text()


@each
def test_jobs_end_and_do_not_pile_up(path: Path) -> None:
    assert load(path)["concurrency"]["group"]
    for name, job in jobs(path).items():
        assert 0 < int(job["timeout-minutes"]) <= 350, name  # GitHub ends a hosted job at 360


@each
def test_no_script_holds_an_expression(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step["name"]


@each
def test_scripts_are_bash_that_stops_at_the_first_failure(path: Path) -> None:
    assert load(path)["defaults"]["run"]["shell"] == "bash"  # GitHub then adds -eo pipefail
    for step in steps(path):
        if "run" in step:
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
            shellcheck = shutil.which("shellcheck")
            if shellcheck:
                done = subprocess.run(
                    [shellcheck, "--shell=bash", "-"],
                    input=step["run"],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout


@each
def test_checkouts_leave_no_token_behind(path: Path) -> None:
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


@each
def test_strangers_code_meets_no_secret_and_no_machine_of_ours(path: Path) -> None:
    triggers = set(load(path)["on"])
    assert not triggers & {"pull_request_target", "workflow_run", "issue_comment"}
    private = "secrets." in path.read_text() or "self-hosted" in path.read_text()
    assert not (private and "pull_request" in triggers)


@each
def test_what_the_scripts_call_is_there(path: Path) -> None:
    for step in steps(path):
        run = step.get("run", "")
        for target in re.findall(r"^ *make ([a-z-]+)", run, flags=re.M):
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target
        for name in re.findall(r"(?<![\w/])(\.(?:ci|github)/[\w.-]+|Dockerfile\.\w+)", run):
            assert (ROOT / name).is_file(), name


@each
def test_what_a_job_downloads_another_has_uploaded(path: Path) -> None:
    uploads = {step["with"]["name"] for step in steps(path) if "upload-artifact@" in step.get("uses", "")}
    for step in steps(path):
        if "download-artifact@" in step.get("uses", "") and "name" in step["with"]:
            assert step["with"]["name"] in uploads


def test_the_tools_find_nothing() -> None:
    """zizmor looks for ways in; check-jsonschema knows what GitHub accepts."""
    checked = 0
    for command in (
        ["zizmor", "--offline", "--no-progress", ".github"],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)],
        ["check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml"],
    ):
        tool = shutil.which(command[0]) or shutil.which(command[0], path=str(Path(sys.executable).parent))
        if tool:
            done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            checked += 1
    if not checked:
        pytest.skip("neither zizmor nor check-jsonschema is installed here")


# --- ci and gpu -------------------------------------------------------------------------------------------


def test_ci_runs_what_everyone_runs() -> None:
    assert any(step.get("run") == ".ci/run" for step in steps(ROOT / ".github" / "workflows" / "ci.yml"))


def test_the_gpu_workflow_keeps_its_promise() -> None:
    smoke = next(
        step
        for step in steps(ROOT / ".github" / "workflows" / "gpu.yml")
        if "gpu-smoke.sh" in step.get("run", "")
    )
    assert smoke["timeout-minutes"] == "5"


DOCKER = """
out=$OUTPUTS
case "$*" in
  *"version --json") echo '{"version": "1"}' ;;
  *"doctor --json") echo '{"event": "finding"}'; exit 3 ;;
  *demo.evaluate*)
    while [ "$1" != --variant ]; do shift; done
    printf 'all 1.0\\n0.31 s a video with scoring\\n'
    [ "$2" != "$BAD" ] ;;
  *--output*)
    while [ "$1" != --output ]; do shift; done
    echo '{"event": "result"}'
    echo mp4 >"$out/$2" ;;
esac
"""


@pytest.fixture
def gpu_runner(tmp_path: Path) -> FakeMachine:
    """A machine whose Docker makes videos at once."""
    machine = FakeMachine(tmp_path)
    machine.fake("docker", DOCKER)
    machine.fake("id", 'if [ "$1" = -u ]; then echo 4711; else echo 4712; fi')
    (machine.bin / "du").symlink_to(shutil.which("du") or "")
    return machine


def test_the_smoke_test_leaves_video_events_and_score_of_each_format(gpu_runner: FakeMachine) -> None:
    done = gpu_runner.run(SMOKE, gpu_runner.root / "found")
    assert done.returncode == 0, done.stderr
    found = {path.name for path in gpu_runner.path("found").iterdir()}
    each_format = {f"{name}.{kind}" for name in ("bf16", "fp8", "int8") for kind in ("mp4", "jsonl", "txt")}
    assert found == each_format | {"version.json", "doctor.json", "summary.md"}
    assert json.loads(gpu_runner.path("found/version.json").read_text())
    videos = [call for call in gpu_runner.calls if " --output " in call]
    assert [re.search(r"--model (\S+)", call)[1] for call in videos] == ["demo", "demo-fp8", "demo-int8"]  # type: ignore[index]
    assert all(
        "--device cuda:0" in call for call in gpu_runner.calls if "t2v --model" in call or "evaluate" in call
    )
    assert gpu_runner.path("found/summary.md").read_text().count("0.31 s a video") == 3


def test_a_format_that_fails_fails_the_run_and_hides_no_other(gpu_runner: FakeMachine) -> None:
    stale = gpu_runner.write("found/bf16.mp4", "of yesterday")
    gpu_runner.write("found/mine.txt", "not ours")
    gpu_runner.fake("docker", 'case "$*" in *demo-int8*) exit 7 ;; esac' + DOCKER)
    done = gpu_runner.run(SMOKE, gpu_runner.root / "found", BAD="fp8")
    assert done.returncode == 1 and "failed: fp8 score,int8 video" in done.stderr
    assert stale.read_text() == "mp4\n" and gpu_runner.path("found/mine.txt").exists()
    summary = gpu_runner.path("found/summary.md").read_text()
    assert re.search(r"bf16 \| \d+ kB \| 0.31", summary) and re.search(r"fp8 \| \d+ kB \| failed", summary)
    assert re.search(r"int8 \| failed \|", summary)


def test_the_smoke_test_asks_for_what_the_scorer_has(gpu_runner: FakeMachine) -> None:
    assert gpu_runner.run(SMOKE, gpu_runner.root / "found").returncode == 0
    accepted = set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / "demo" / "evaluate.py").read_text()))
    calls = [
        call.split("demo.evaluate")[1] for call in gpu_runner.called("docker") if "demo.evaluate" in call
    ]
    assert len(calls) == 3 and all(set(re.findall(r"--[a-z-]+", call)) <= accepted for call in calls)
    asked = [re.search(r"--variant (\w+) .*--at-least (\S+)", call).groups() for call in calls]  # type: ignore[union-attr]
    assert asked == [("bf16", "0.90"), ("fp8", "0.88"), ("int8", "0.88")]  # as `make demo-score`
    assert all(f"--variant {name} --prompts 108 --at-least {least}" in MAKEFILE for name, least in asked)
    assert "with scoring" in (ROOT / "demo" / "evaluate.py").read_text()  # the line that the summary takes


# --- publish ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "tag", "registry", "status", "told"),
    [
        ("push", "v0.1.0", "example", 0, ""),
        ("push", "v9.9.9", "example", 1, "The tag is v9.9.9; expected v0.1.0"),
        ("push", "v0.1.0", "", 1, "IMAGE_REGISTRY or IMAGE_NAME is empty"),
        ("workflow_dispatch", "main", "", 0, ""),
    ],
)
def test_a_release_is_named_by_its_version(
    tmp_path: Path, event: str, tag: str, registry: str, status: int, told: str
) -> None:
    machine = FakeMachine(tmp_path)
    machine.write("pyproject.toml", 'name = "fourstep"\nversion = "0.1.0"\n')
    machine.fake("git", "echo 1700000000")
    done = machine.run(
        *("bash", "-eo", "pipefail", "-c", script("publish", "version and time of the commit")),
        GITHUB_EVENT_NAME=event,
        GITHUB_REF_NAME=tag,
        REGISTRY=registry,
        IMAGE=f"{registry}/fourstep" if registry else "/",
        GITHUB_OUTPUT=str(machine.root / "output"),
    )
    assert done.returncode == status and told in done.stdout
    if status == 0:
        assert machine.path("output").read_text() == "version=0.1.0\nepoch=1700000000\n"


@pytest.mark.parametrize("named", ["sha256:a", "sha256:b"])
def test_a_tag_names_what_was_signed(tmp_path: Path, named: str) -> None:
    machine = FakeMachine(tmp_path)
    machine.fake("cosign")
    machine.fake("docker", f'case "$*" in *inspect*) echo {named} ;; esac')
    done = machine.run(
        *("bash", "-eo", "pipefail", "-c", script("publish", "sign, then name")),
        IMAGE="example/fourstep",
        DIGEST="sha256:a",
        VERSION="0.1.0",
        TAG="cu124",
    )
    assert done.returncode == int(named != "sha256:a")
    assert machine.calls[0] == "cosign sign --yes --recursive example/fourstep@sha256:a"
    assert "--tag example/fourstep:0.1.0-cu124" in machine.calls[1]


DOCKERFILE = """\
ARG TAG=cu124
ARG CUDA_IMAGE=nvidia/cuda:12.4.1
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS base
ARG KERNEL_COMMIT=%s
ARG KERNEL_SHA256=""
RUN /opt/docker/source.sh %s "$KERNEL_COMMIT" "$KERNEL_SHA256"
"""


@pytest.fixture
def release(tmp_path: Path) -> FakeMachine:
    """Two Dockerfiles that name a source and bases without digests, and a registry that knows the bases."""
    machine = FakeMachine(tmp_path)
    digest = '{"digest": "sha256:%064d"}'
    machine.fake("docker", f"case \"$4\" in python*) echo '{digest % 1}' ;; *) echo '{digest % 2}' ;; esac")
    source = tmp_path / "kernel"
    source.mkdir()
    (source / "kernel.cu").write_text("__global__ void f() {}\n")
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in ("Dockerfile.a", "Dockerfile.b"):
        machine.write(name, DOCKERFILE % (commit, source))
    return machine


def pins(machine: FakeMachine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return machine.run(sys.executable, PINS, *arguments, HOME=os.environ.get("HOME", "/"))


def test_pins_are_resolved_written_and_then_stay(release: FakeMachine) -> None:
    resolved = pins(release, "resolve", "Dockerfile.a", "Dockerfile.b")
    assert resolved.returncode == 0, resolved.stderr
    release.write("pins.json", resolved.stdout)
    found = json.loads(resolved.stdout)
    assert found["Dockerfile.a"] == found["Dockerfile.b"]
    assert len(release.called("docker")) == 2, "both files get the same answer"
    assert found["Dockerfile.a"]["PYTHON_IMAGE"] == f"python:3.11-slim@sha256:{1:064d}"
    assert re.fullmatch(r"[0-9a-f]{64}", found["Dockerfile.a"]["KERNEL_SHA256"])
    lines = pins(release, "arguments", "pins.json", "Dockerfile.a").stdout.splitlines()
    assert f"CUDA_IMAGE=nvidia/cuda:12.4.1@sha256:{2:064d}" in lines and len(lines) == 3

    assert pins(release, "apply", "pins.json").stdout.count("pins written") == 2
    text = release.path("Dockerfile.a").read_text()
    assert f"ARG PYTHON_IMAGE=python:3.11-slim@sha256:{1:064d}\n" in text
    assert f'ARG KERNEL_SHA256="{found["Dockerfile.a"]["KERNEL_SHA256"]}"\n' in text

    release.forget()
    release.fake("docker", "exit 1")  # bases that are pinned are not asked for; sources are compared again
    again = pins(release, "resolve", "Dockerfile.a", "Dockerfile.b")
    assert again.stdout == resolved.stdout and not release.called("docker")
    assert pins(release, "apply", "pins.json").stdout.count("pinned so already") == 2


def test_a_source_that_changed_under_its_commit_is_an_error(release: FakeMachine) -> None:
    wrong = "f" * 64
    for name in ("Dockerfile.a", "Dockerfile.b"):
        text = release.path(name).read_text()
        release.write(name, text.replace('KERNEL_SHA256=""', f'KERNEL_SHA256="{wrong}"'))
    done = pins(release, "resolve", "Dockerfile.a")
    assert done.returncode == 1 and f"expected {wrong}" in done.stderr


@pytest.mark.parametrize("answer", ['{"digest": "latest"}', "{"])
def test_a_registry_that_answers_nonsense_pins_nothing(release: FakeMachine, answer: str) -> None:
    release.fake("docker", f"echo '{answer}'")
    done = pins(release, "resolve", "Dockerfile.a")
    assert done.returncode == 1 and not done.stdout


def test_pins_need_their_line(release: FakeMachine) -> None:
    release.write("pins.json", json.dumps({"Dockerfile.a": {"LOST_SHA256": "0"}}))
    done = pins(release, "apply", "pins.json")
    assert done.returncode == 1 and "0 lines 'ARG LOST_SHA256='" in done.stderr


def test_the_real_dockerfiles_take_the_pins(release: FakeMachine) -> None:
    images = {"PYTHON_IMAGE": f"python@sha256:{1:064d}", "CUDA_IMAGE": f"cuda@sha256:{2:064d}"}
    found = {"SAGE_SHA256": "a" * 64, "Q8_SHA256": "b" * 64}
    for path in ROOT.glob("Dockerfile.*"):
        release.write(path.name, path.read_text())
        sources = set(re.findall(r'source\.sh \S+ "\$(\w+)_COMMIT" "\$\1_SHA256"', path.read_text()))
        assert {f"{name}_SHA256" for name in sources} == set(found)
    names = [path.name for path in ROOT.glob("Dockerfile.*")]
    release.write("pins.json", json.dumps(dict.fromkeys(names, images | found)))
    assert pins(release, "apply", "pins.json").stdout.count("pins written") == len(names) == 2
    for name in names:
        text = release.path(name).read_text()
        assert all(f"={value}\n" in text or f'="{value}"\n' in text for value in (images | found).values())
