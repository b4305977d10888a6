"""deploy/job.sh with a fake Docker: prepared and done once, resumed after an interruption, asked to stop."""

import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from entrypoint.cli import cli
from tests.fake_machine import FakeMachine

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "deploy" / "job.sh"
OUTPUTS = "var/lib/fourstep/outputs"
WEIGHTS = "var/lib/fourstep/weights"
SETTINGS = {"T2V_PROMPT": "A red fox, $5 & 'more'", "T2V_MODEL": "wan2.1-t2v-14b-4step-fp8"}

# Remembers images; notes the environment that Compose would read; runs $DESTDIR/job as the program.
DOCKER = """
images=$DESTDIR/images
touch "$images"
case "$1 $2" in
  "image inspect") grep -qx "$3" "$images"; exit ;;
  "pull --quiet") echo "$3" >>"$images" ;;
  "tag "*) echo "$3" >>"$images" ;;
esac
if [ "$1" = compose ]; then
  for last; do :; done
  env | grep -E '^(TAG|UID|GID|WEIGHTS|OUTPUTS|T2V_PROMPT)=' >"$DESTDIR/env-$6-$last"
  case " $* " in
    *" build "*) echo "fourstep:$TAG" >>"$images" ;;
    *" --name fourstep-job "*) [ ! -e "$DESTDIR/job" ] || . "$DESTDIR/job" ;;
    *" pull "*) [ ! -e "$DESTDIR/pull" ] || . "$DESTDIR/pull" ;;
  esac
fi
"""


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A machine that install.sh has made ready, with a recent driver."""
    machine = FakeMachine(tmp_path)
    machine.fake("docker", DOCKER)
    machine.fake("nvidia-smi", "echo 570.86.15; echo 570.86.15")
    for directory in (OUTPUTS, WEIGHTS):
        machine.path(directory).mkdir(parents=True)
    return machine


def job(machine: FakeMachine, verb: str, **settings: str) -> CompletedProcess[str]:
    return machine.run(JOB, verb, **{**SETTINGS, **settings})


def runs(machine: FakeMachine) -> list[list[str]]:
    """What Compose was told after its own options, for each call."""
    return [call.split("compose.yaml ")[1].split() for call in machine.called("docker compose")]


def test_first_the_image_then_weights_then_a_look_at_the_machine(machine: FakeMachine) -> None:
    done = job(machine, "prepare", FOURSTEP_IMAGE="example/fourstep@sha256:1")
    assert done.returncode == 0, done.stderr
    assert machine.called("docker pull") == ["docker pull --quiet example/fourstep@sha256:1"]
    assert machine.called("docker tag") == ["docker tag example/fourstep@sha256:1 fourstep:cu128"]
    assert runs(machine) == [["run", "--rm", "-T", "pull"], ["run", "--rm", "-T", "doctor"]]
    assert machine.path("run/fourstep/worked").exists()


def test_a_second_boot_pulls_no_image(machine: FakeMachine) -> None:
    for _ in range(2):
        machine.forget()
        assert job(machine, "prepare", FOURSTEP_IMAGE="example/fourstep:1").returncode == 0
    assert not machine.called("docker pull")


def test_without_a_published_image_one_is_built_once(machine: FakeMachine) -> None:
    assert job(machine, "prepare").returncode == 0
    assert runs(machine)[0] == ["build", "--build-arg", "SAGE=off", "t2v"]
    machine.forget()
    assert job(machine, "prepare", FOURSTEP_SAGE="on").returncode == 0
    assert [one[-1] for one in runs(machine)] == ["pull", "doctor"]


@pytest.mark.parametrize(
    ("driver", "tag"), [("550.54.14", "cu124"), ("569.99", "cu124"), ("570.26", "cu128"), ("580.1", "cu128")]
)
def test_the_driver_decides_about_the_image(machine: FakeMachine, driver: str, tag: str) -> None:
    machine.fake("nvidia-smi", f"echo {driver}")
    assert job(machine, "run").returncode == 0
    assert f"TAG={tag}\n" in machine.path("env-run-t2v").read_text()


def test_the_driver_that_decides_is_the_images_own() -> None:
    images = yaml.safe_load((ROOT / "profiles" / "images.yaml").read_text())["images"]
    needed = next(one["driver"] for one in images if one["tag"] == "cu128").split(".")[0]
    assert f"-ge {needed} ]; then echo cu128; else echo cu124" in JOB.read_text()
    assert {one["tag"] for one in images} == {"cu124", "cu128"}


def test_a_named_tag_wins(machine: FakeMachine) -> None:
    assert job(machine, "run", TAG="cu124").returncode == 0
    assert "TAG=cu124\n" in machine.path("env-run-t2v").read_text() and not machine.called("nvidia-smi")


def test_containers_run_as_the_owner_of_the_directory(machine: FakeMachine) -> None:
    assert job(machine, "prepare").returncode == 0 and job(machine, "run").returncode == 0
    told = machine.path("env-run-t2v").read_text()
    owner = machine.path(OUTPUTS).stat()
    assert f"UID={owner.st_uid}\n" in told and f"GID={owner.st_gid}\n" in told
    assert f"OUTPUTS={machine.path(OUTPUTS)}\n" in told and f"WEIGHTS={machine.path(WEIGHTS)}\n" in told
    assert f"T2V_PROMPT={SETTINGS['T2V_PROMPT']}\n" in told
    if os.geteuid() == 0:
        os.chown(machine.path(WEIGHTS), 4711, 4712)
        assert job(machine, "prepare", T2V_SEED="2").returncode == 0
        assert "UID=4711\n" in machine.path("env-run-pull").read_text()
        assert f"UID={owner.st_uid}\n" in machine.path("env-run-doctor").read_text()


def test_a_job_is_done_once(machine: FakeMachine) -> None:
    assert job(machine, "run").returncode == 0
    assert runs(machine) == [["run", "--rm", "-T", "--name", "fourstep-job", "t2v"]]
    machine.path("run/fourstep").mkdir(parents=True, exist_ok=True)
    machine.forget()
    assert job(machine, "prepare").returncode == 0 and job(machine, "run").returncode == 0
    assert machine.calls == [] and not machine.path("run/fourstep/worked").exists()


def test_other_settings_are_another_job(machine: FakeMachine) -> None:
    assert job(machine, "run").returncode == 0
    assert job(machine, "run", FOURSTEP_SHUTDOWN="idle").returncode == 0
    assert len(runs(machine)) == 1
    assert job(machine, "run", T2V_SEED="8").returncode == 0
    assert len(runs(machine)) == 2


def test_the_programs_exit_status_is_the_jobs(machine: FakeMachine) -> None:
    machine.write("job", "exit 4")
    assert job(machine, "run").returncode == 4
    assert job(machine, "run").returncode == 4, "what failed is not done"
    machine.write("pull", "exit 3")
    assert job(machine, "prepare", T2V_SEED="1").returncode == 3
    assert "doctor" not in runs(machine)[-1]


def test_an_interrupted_job_goes_on(machine: FakeMachine) -> None:
    machine.write("job", f'touch "$DESTDIR/{OUTPUTS}/a fox.run.safetensors"; exit 137')
    assert job(machine, "run").returncode == 137
    age(machine.path(f"{OUTPUTS}/.fourstep-started"))
    machine.write("job", f'rm "$DESTDIR/{OUTPUTS}/a fox.run.safetensors"')
    done = job(machine, "run")
    assert done.returncode == 0, done.stderr
    call = machine.called("docker compose")[-1]
    assert call.endswith(" --name fourstep-job t2v resume /outputs/a fox.run.safetensors")
    machine.forget()
    assert job(machine, "run").returncode == 0 and machine.calls == []


def test_only_this_jobs_own_run_is_resumed(machine: FakeMachine) -> None:
    left = machine.write(f"{OUTPUTS}/old.run.safetensors")
    age(left)
    machine.write("job", "exit 1")
    assert job(machine, "run").returncode == 1  # failed before it wrote anything
    assert job(machine, "run").returncode == 1
    assert not [call for call in machine.calls if "resume" in call]
    machine.write(f"{OUTPUTS}/mine.run.safetensors")
    age(machine.path(f"{OUTPUTS}/.fourstep-started"))
    assert job(machine, "run", T2V_SEED="9").returncode == 1  # another job: mine is not its own
    assert not [call for call in machine.calls if "resume" in call]


def test_outputs_on_a_network_disk_bring_the_job_along(machine: FakeMachine, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    machine.write("job", f'touch "{bucket}/fox.run.safetensors"; exit 137')
    assert job(machine, "run", FOURSTEP_OUTPUTS=str(bucket)).returncode == 137
    age(bucket / ".fourstep-started")
    second = FakeMachine(tmp_path / "second")
    second.fake("docker", DOCKER)
    second.fake("nvidia-smi", "echo 550.1")
    done = job(second, "run", FOURSTEP_OUTPUTS=str(bucket))
    assert done.returncode == 0 and "resume /outputs/fox.run.safetensors" in second.calls[-1]


def test_a_container_that_a_power_cut_left_does_not_block(machine: FakeMachine) -> None:
    machine.fake("docker", DOCKER + '[ "$1" != rm ] || exit 1')
    assert job(machine, "run").returncode == 0
    removed = machine.calls.index("docker rm --force fourstep-job")
    assert removed < next(n for n, call in enumerate(machine.calls) if "--name fourstep-job" in call)


def test_stopping_asks_and_waits_and_never_fails(machine: FakeMachine) -> None:
    machine.fake("docker", "exit 1")  # there is no such container
    assert job(machine, "stop").returncode == 0
    assert machine.calls == ["docker stop --time 30 fourstep-job"]


def test_no_driver_and_no_verb_are_sentences(machine: FakeMachine) -> None:
    machine.fake("nvidia-smi", "exit 9")
    done = job(machine, "prepare")
    assert done.returncode == 5 and "No NVIDIA driver answers" in done.stderr and not machine.called("docker")
    done = job(machine, "dance")
    assert done.returncode == 2 and "'dance' is none of prepare, run and stop" in done.stderr


def test_the_program_has_the_verbs_that_the_job_needs() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {"t2v", "pull", "doctor"} <= set(services)
    assert {"generate", "resume"} <= set(cli.commands)


def age(path: Path) -> None:
    """As if it had been written a minute ago: files of one second are not told apart by every file system."""
    then = path.stat().st_mtime - 60
    os.utime(path, (then, then))
