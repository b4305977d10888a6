"""deploy/: units, cloud-init and the SkyPilot task hang together, and name only what exists.

Their own tools check more where they are installed: `cloud-init schema` and `systemd-analyze verify`.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from entrypoint.cli import cli
from runtime.errors import (
    DeviceError,
    FourstepError,
    OutOfMemoryError,
    OutputCheckError,
    PlanError,
    RequestError,
    WeightsError,
)
from tests.fake_machine import FakeMachine

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
ASSIGNMENT = re.compile(r"^#?((?:T2V|FOURSTEP|HF)_[A-Z_]+)=(.*)$", re.M)


def cloud_config() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "cloud-init.yaml").read_text())


def written(path: str) -> str:
    """What cloud-init writes to `path`."""
    return next(one["content"] for one in cloud_config()["write_files"] if one["path"] == path)


def unit(name: str) -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


def options_of_the_program() -> set[str]:
    def all_of(group: click.Group) -> Iterator[str]:
        for command in group.commands.values():
            yield from (
                one.name.upper() for one in command.params if isinstance(one, click.Option) and one.name
            )
            if isinstance(command, click.Group):
                yield from all_of(command)

    return {f"T2V_{name}" for name in all_of(cli)}


# --- scripts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_can_be_run(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert script.stat().st_mode & 0o111
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# --- settings ---------------------------------------------------------------------------------------------


def test_cloud_init_writes_the_same_job_as_the_template() -> None:
    template = (DEPLOY / "job.env").read_text().splitlines()
    assert written("/etc/fourstep/job.env").splitlines()[1:] == template[1:]


def test_settings_of_the_job_mean_something() -> None:
    names = [name for name, _ in ASSIGNMENT.findall((DEPLOY / "job.env").read_text())]
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("T2V_")} <= options_of_the_program()
    used = "".join(path.read_text() for path in SCRIPTS)
    assert all(f"${{{name}:-" in used for name in names if name.startswith("FOURSTEP_"))
    pull = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["pull"]["environment"]
    assert {name for name in names if name.startswith("HF_")} <= set(pull)


def test_settings_that_the_page_names_are_read_somewhere() -> None:
    read = "".join(
        path.read_text() for path in [*SCRIPTS, DEPLOY / "cloud-init.yaml", DEPLOY / "skypilot.yaml"]
    )
    named = set(re.findall(r"\bFOURSTEP_[A-Z_]+", (ROOT / "docs" / "cloud.md").read_text()))
    assert named and not {name for name in named if f"${{{name}" not in read}


def test_compose_hands_the_settings_of_the_job_on() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    names = {
        name for name, _ in ASSIGNMENT.findall((DEPLOY / "job.env").read_text()) if name.startswith("T2V_")
    }
    assert names <= set(services["t2v"]["environment"])
    assert "T2V_MODEL" in services["pull"]["environment"]


# --- systemd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fourstep-job.service", "fourstep-idle.service"])
def test_units_start_scripts_that_exist(name: str) -> None:
    service = unit(name)["Service"]
    commands = [value for key, value in service.items() if key.startswith("Exec")]
    assert commands
    for command in commands:
        script, *arguments = command.split()
        path = Path(script.replace("@HERE@", str(DEPLOY)))
        assert script.startswith("@HERE@/") and path.is_file()
        assert all(f"  {argument}) " in path.read_text() for argument in arguments)


def test_what_would_fail_again_is_not_tried_again() -> None:
    service = unit("fourstep-job.service")["Service"]
    hopeless = {
        error.exit_code for error in (RequestError, WeightsError, PlanError, DeviceError, OutputCheckError)
    }
    assert {int(one) for one in service["RestartPreventExitStatus"].split()} == hopeless
    assert service["Restart"] == "on-failure"
    assert OutOfMemoryError.exit_code not in hopeless and FourstepError.exit_code not in hopeless
    assert int(unit("fourstep-job.service")["Unit"]["StartLimitBurst"]) < 10


def test_systemd_waits_longer_than_docker_and_docker_longer_than_the_program() -> None:
    stop = re.search(r"docker stop --time (\d+)", (DEPLOY / "job.sh").read_text())
    grace = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["t2v"]["stop_grace_period"]
    assert stop is not None
    assert 10 < int(stop[1]) < int(unit("fourstep-job.service")["Service"]["TimeoutStopSec"])
    assert int(grace.rstrip("s")) == int(stop[1])


def test_systemd_reads_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    for path in DEPLOY.glob("fourstep-*"):
        (tmp_path / path.name).write_text(path.read_text().replace("@HERE@", str(DEPLOY)))
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    units = sorted(tmp_path.glob("fourstep-*"))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "fourstep" in line]
    assert not ours, "\n".join(ours)


# --- cloud-init -------------------------------------------------------------------------------------------


def test_cloud_init_is_small_enough_for_every_provider() -> None:
    assert (DEPLOY / "cloud-init.yaml").stat().st_size < 16 * 1024
    assert (DEPLOY / "cloud-init.yaml").read_text().startswith("#cloud-config\n")


def test_cloud_init_reads_it() -> None:
    if shutil.which("cloud-init") is None:
        pytest.skip("cloud-init is not installed here")
    command = ["cloud-init", "schema", "--config-file", str(DEPLOY / "cloud-init.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Valid" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A machine at its first boot, after cloud-init wrote its files, and a repository to fetch from."""
    machine = FakeMachine(tmp_path)
    for one in cloud_config()["write_files"]:
        machine.write(one["path"], one["content"]).chmod(int(one["permissions"], 8))
    for name in ("systemctl", "sleep"):
        machine.fake(name)
    repository = tmp_path / "repository"
    (repository / "deploy").mkdir(parents=True)
    install = repository / "deploy" / "install.sh"
    install.write_text('#!/bin/sh\necho "install.sh in $0" >>"$CALLS"\n')
    install.chmod(0o755)
    for command in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t", "commit", "--quiet", "-m", "x"],
    ):
        subprocess.run(["git", "-C", repository, *command], check=True)
    return machine


def set_up(machine: FakeMachine, repository: Path | str) -> subprocess.CompletedProcess[str]:
    source = written("/etc/fourstep/source.env")
    machine.write(
        "etc/fourstep/source.env", source.replace("FOURSTEP_REPOSITORY=", f"FOURSTEP_REPOSITORY={repository}")
    )
    return machine.run(machine.path("/usr/local/sbin/fourstep-setup"))


def test_the_first_boot_fetches_installs_and_starts(machine: FakeMachine, tmp_path: Path) -> None:
    assert cloud_config()["runcmd"] == [["/usr/local/sbin/fourstep-setup"]]
    for again in (False, True):  # run by hand once more, it fetches nothing
        machine.forget()
        done = set_up(machine, "/nowhere" if again else tmp_path / "repository")
        assert done.returncode == 0, done.stderr
        place = machine.path("opt/fourstep/deploy/install.sh")
        started = "systemctl start --no-block fourstep-job.service fourstep-idle.timer"
        assert machine.calls == [f"install.sh in {place}", started]


def test_a_repository_that_does_not_answer_is_asked_five_times(machine: FakeMachine) -> None:
    done = set_up(machine, "/nowhere")
    assert done.returncode == 1 and machine.calls == ["sleep 10"] * 4
    assert "main of /nowhere cannot be fetched" in done.stderr.splitlines()[-1]


def test_no_repository_is_one_sentence(machine: FakeMachine) -> None:
    done = set_up(machine, "")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "FOURSTEP_REPOSITORY is empty" in done.stderr and not machine.calls


# --- SkyPilot ---------------------------------------------------------------------------------------------


def test_the_skypilot_task_uses_what_exists() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "workdir", "resources", "file_mounts", "envs", "setup", "run"}
    assert {name for name in task["envs"] if name.startswith("T2V_")} <= options_of_the_program()
    scripts = "".join(path.read_text() for path in SCRIPTS)
    ours = {name for name in task["envs"] if name.startswith("FOURSTEP_")}
    assert all(f"${{{name}:-" in scripts for name in ours - {"FOURSTEP_BUCKET"})
    assert task["file_mounts"][task["envs"]["FOURSTEP_OUTPUTS"]]["name"] == "${FOURSTEP_BUCKET}"
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())


@pytest.mark.parametrize(
    ("part", "calls"),
    [
        ("setup", ["sudo deploy/install.sh --engine", "sudo -E deploy/job.sh prepare"]),
        ("run", ["sudo -E deploy/job.sh run"]),
    ],
)
def test_the_skypilot_task_runs_our_scripts(tmp_path: Path, part: str, calls: list[str]) -> None:
    machine = FakeMachine(tmp_path)
    machine.fake("sudo", "exit ${STATUS:-0}")
    script = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())[part]
    assert machine.run("bash", "-c", script).returncode == 0
    assert machine.calls == calls
    assert all((ROOT / re.split(r"\s", call)[-2]).is_file() for call in calls)
    assert machine.run("bash", "-ec", script, STATUS="4").returncode == 4


def test_the_skypilot_task_stops_its_container(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.fake("sudo", 'case "$*" in *run) kill -TERM $PPID ;; esac')
    script = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())["run"]
    machine.run("bash", "-c", script)
    assert machine.calls[-1] == "sudo deploy/job.sh stop"
