"""deploy/install.sh and deploy/idle.sh, run with fakes of everything that would change a machine."""

from pathlib import Path

import pytest

from tests.fake_machine import FakeMachine

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DOCKER_KEY = "9DC858229FC7DD38854AE2D88D81803C0EBFCD88"
TOOLKIT_KEY = "C95B321B61E88C1809C4F759DDCAE044F796ECB0"
# What gpg prints of a key with a subkey: only the first fingerprint is the key's own.
KEY_LISTING = "pub:-:4096:1:0:0::::::scESC:\\nfpr:::::::::%s:\\nsub:-:4096::::::::::\\nfpr:::::::::0000:\\n"

GPG = f"""
case "$*" in
  *docker.asc.part*) printf '{KEY_LISTING}' {DOCKER_KEY} ;;
  *toolkit.asc.part*) printf '{KEY_LISTING}' {TOOLKIT_KEY} ;;
esac"""
CURL = 'while [ "$1" != --output ]; do shift; done; echo key >"$2"'
# apt brings the commands that the packages hold.
APT = """
case " $* " in
  *" docker-ce "*) cp "$FAKES/docker" "$FAKES/docker-compose" "${0%/*}" ;;
  *" docker-compose-plugin "*) cp "$FAKES/docker-compose" "${0%/*}" ;;
  *" nvidia-container-toolkit "*) cp "$FAKES/nvidia-ctk" "${0%/*}" ;;
esac"""
DOCKER = """
case "$1 $2" in
  "compose version") [ -e "${0%/*}/docker-compose" ] ;;
  "info --format") cat "$DESTDIR/runtimes" ;;
esac"""
REGISTER = 'echo \'{"nvidia":{},"runc":{}}\' >"$DESTDIR/runtimes"'


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A fresh Ubuntu with a driver: no Docker, no toolkit, no units."""
    machine = FakeMachine(tmp_path)
    machine.write("etc/os-release", 'ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME="noble"\n')
    machine.write("runtimes", '{"runc":{}}')
    answers = {"id": "echo 0", "uname": "echo x86_64", "getent": "exit 2"}
    packages = {"gpg": GPG, "curl": CURL, "apt-get": APT}
    silent = dict.fromkeys(("nvidia-smi", "systemctl", "useradd", "chown", "sleep"), "")
    for name, script in (answers | packages | silent).items():
        machine.fake(name, script)
    fakes = tmp_path / "packages"
    fakes.mkdir()
    for name, script in {"docker": DOCKER, "docker-compose": "", "nvidia-ctk": REGISTER}.items():
        machine.fake(name, script)
        (machine.bin / name).rename(fakes / name)
    return machine


def install(machine: FakeMachine, **environment: str) -> tuple[int, str]:
    fakes = str(machine.bin.parent / "packages")
    done = machine.run(DEPLOY / "install.sh", FAKES=fakes, **environment)
    return done.returncode, done.stderr


def installed(machine: FakeMachine) -> str:
    return " ".join(machine.called("apt-get"))


def test_a_fresh_machine_gets_everything(machine: FakeMachine) -> None:
    status, told = install(machine)
    assert status == 0, told
    assert "docker-ce" in installed(machine) and "nvidia-container-toolkit" in installed(machine)
    assert machine.called("nvidia-ctk") == ["nvidia-ctk runtime configure --runtime=docker"]
    assert "systemctl restart docker" in machine.calls
    assert machine.called("useradd")[0].endswith(" fourstep")
    source = machine.path("etc/apt/sources.list.d/docker.list").read_text()
    assert "signed-by=/etc/apt/keyrings/docker.asc]" in source and source.endswith("/ubuntu noble stable\n")
    toolkit = machine.path("etc/apt/sources.list.d/nvidia-container-toolkit.list").read_text()
    assert "signed-by=/etc/apt/keyrings/nvidia-container-toolkit.asc]" in toolkit
    assert not list(machine.path("etc/apt/keyrings").glob("*.part"))
    for name in ("weights", "outputs"):
        assert machine.path(f"var/lib/fourstep/{name}").is_dir()
    settings = machine.path("etc/fourstep/job.env")
    assert (
        settings.read_text() == (DEPLOY / "job.env").read_text() and settings.stat().st_mode & 0o777 == 0o600
    )


def test_units_are_there_complete_and_enabled(machine: FakeMachine) -> None:
    assert install(machine)[0] == 0
    units = {path.name: path.read_text() for path in machine.path("etc/systemd/system").iterdir()}
    assert set(units) == {"fourstep-job.service", "fourstep-idle.service", "fourstep-idle.timer"}
    assert not [name for name, text in units.items() if "@HERE@/" in text]
    assert f"ExecStart={DEPLOY}/job.sh run" in units["fourstep-job.service"]
    order = [
        call for call in machine.calls if call.startswith(("systemctl daemon-reload", "systemctl enable --q"))
    ]
    assert order[0] == "systemctl daemon-reload"
    assert order[-1] == "systemctl enable --quiet fourstep-job.service fourstep-idle.timer"


def test_the_engine_alone_leaves_the_boot_as_it_was(machine: FakeMachine) -> None:
    fakes = str(machine.bin.parent / "packages")
    assert machine.run(DEPLOY / "install.sh", "--engine", FAKES=fakes).returncode == 0
    assert (
        "nvidia-container-toolkit" in installed(machine) and machine.path("var/lib/fourstep/outputs").is_dir()
    )
    assert not machine.path("etc/systemd/system").exists() and not machine.path("etc/fourstep").exists()
    assert machine.run(DEPLOY / "install.sh", "--all").returncode == 1


def test_a_second_run_changes_nothing(machine: FakeMachine) -> None:
    assert install(machine)[0] == 0
    machine.write("etc/fourstep/job.env", "T2V_PROMPT=mine\n")
    machine.fake("getent", "echo fourstep:x:999")
    machine.forget()
    status, told = install(machine)
    assert status == 0, told
    assert "docker" not in installed(machine) and "toolkit" not in installed(machine)
    for nothing in ("curl", "useradd", "nvidia-ctk", "systemctl restart"):
        assert not machine.called(nothing)
    assert machine.path("etc/fourstep/job.env").read_text() == "T2V_PROMPT=mine\n"


def test_a_docker_without_compose_keeps_its_engine(machine: FakeMachine) -> None:
    machine.fake("docker", DOCKER)
    status, told = install(machine)
    assert status == 0, told
    assert "docker-compose-plugin" in installed(machine) and "docker-ce" not in installed(machine)


def test_a_machine_that_is_ready_is_not_disturbed(machine: FakeMachine) -> None:
    for name, script in {"docker": DOCKER, "docker-compose": "", "nvidia-ctk": REGISTER}.items():
        machine.fake(name, script)
    machine.write("runtimes", '{"nvidia":{"path":"x"},"runc":{}}')
    assert install(machine)[0] == 0
    assert not machine.called("systemctl restart") and not machine.called("curl")


@pytest.mark.parametrize(
    "system", ["ID=debian\nVERSION_CODENAME=bookworm", "ID=x\nID_LIKE='debian'\nVERSION_CODENAME=y"]
)
def test_debian_and_its_relatives_use_debians_packages(machine: FakeMachine, system: str) -> None:
    machine.write("etc/os-release", system)
    assert install(machine)[0] == 0
    assert any("/linux/debian/gpg" in call for call in machine.called("curl"))


def test_a_relative_of_ubuntu_uses_the_release_that_it_is_made_from(machine: FakeMachine) -> None:
    machine.write(
        "etc/os-release", "ID=mint\nID_LIKE='ubuntu debian'\nVERSION_CODENAME=a\nUBUNTU_CODENAME=noble"
    )
    assert install(machine)[0] == 0
    assert machine.path("etc/apt/sources.list.d/docker.list").read_text().endswith("/ubuntu noble stable\n")


def test_a_driver_that_is_still_being_built_is_waited_for(machine: FakeMachine) -> None:
    machine.fake("nvidia-smi", 'echo >>"$DESTDIR/asked"; [ "$(grep -c "" "$DESTDIR/asked")" -gt 3 ]')
    assert install(machine)[0] == 0
    assert machine.called("sleep") == ["sleep 5"] * 3


def test_a_foreign_key_is_refused_before_anything_is_trusted(machine: FakeMachine) -> None:
    machine.fake("gpg", f"printf '{KEY_LISTING}' {TOOLKIT_KEY}")
    status, told = install(machine)
    assert status == 1 and TOOLKIT_KEY in told and DOCKER_KEY in told
    assert not list(machine.path("etc/apt").rglob("docker*"))
    assert "docker-ce" not in installed(machine)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "echo 1000"}, "Installing needs root"),
        ({"uname": "echo aarch64"}, "This machine is aarch64; expected x86_64"),
        ({"nvidia-smi": "exit 9"}, "No NVIDIA driver answers"),
        ({"os-release": "ID=fedora"}, "This system is 'fedora'; expected Debian or Ubuntu"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    machine: FakeMachine, change: dict[str, str], sentence: str
) -> None:
    for name, script in change.items():
        if name == "os-release":
            machine.write("etc/os-release", script)
        else:
            machine.fake(name, script)
    status, told = install(machine, DRIVER_WAIT="10")
    assert status == 1 and told.count("\n") == 1 and sentence in told
    assert "docker" not in installed(machine)


def test_a_failed_download_is_a_failure(machine: FakeMachine) -> None:
    machine.fake("curl", "exit 22")
    assert install(machine)[0] == 22
    assert "docker-ce" not in installed(machine)


# --- idle.sh ----------------------------------------------------------------------------------------------

FREE = {"systemctl": "echo inactive; exit 3", "who": "", "nvidia-smi": "", "shutdown": ""}


@pytest.fixture
def idle_machine(tmp_path: Path) -> FakeMachine:
    """A machine with nothing to do, whose job has run since boot."""
    machine = FakeMachine(tmp_path)
    for name, script in FREE.items():
        machine.fake(name, script)
    machine.write("run/fourstep/worked")
    machine.write("proc/uptime", "100.25 300.00\n")
    return machine


def look(machine: FakeMachine, mode: str, minutes: int = 15, uptime: int | None = None) -> list[str]:
    """The shutdowns that one look at the machine announces."""
    machine.forget()
    if uptime is not None:
        machine.write("proc/uptime", f"{uptime}.99 0.00\n")
    done = machine.run(DEPLOY / "idle.sh", FOURSTEP_SHUTDOWN=mode, FOURSTEP_IDLE_MINUTES=str(minutes))
    assert done.returncode == 0, done.stderr
    return machine.called("shutdown")


def test_a_machine_stays_on_unless_told_otherwise(idle_machine: FakeMachine) -> None:
    assert look(idle_machine, "never", uptime=10**6) == []
    assert idle_machine.run(DEPLOY / "idle.sh").returncode == 0 and not idle_machine.called("shutdown")


@pytest.mark.parametrize(
    ("state", "ended"), [("inactive", 1), ("failed", 1), ("active", 0), ("activating", 0)]
)
def test_off_after_the_job_and_not_before(idle_machine: FakeMachine, state: str, ended: int) -> None:
    idle_machine.fake("systemctl", f"echo {state}; [ {state} = active ]")
    shutdowns = look(idle_machine, "after-job")
    assert len(shutdowns) == ended
    assert all(call.startswith("shutdown -h +2 ") and "shutdown -c" in call for call in shutdowns)


def test_a_machine_that_is_on_again_for_its_video_stays_on(idle_machine: FakeMachine) -> None:
    idle_machine.path("run/fourstep/worked").unlink()
    assert look(idle_machine, "after-job") == []


@pytest.mark.parametrize("mode", ["after-job", "idle"])
def test_a_shutdown_is_announced_once(idle_machine: FakeMachine, mode: str) -> None:
    look(idle_machine, mode, 1, uptime=100)
    idle_machine.write("run/systemd/shutdown/scheduled", "USEC=1")
    assert look(idle_machine, mode, 1, uptime=200) == []


def test_off_after_minutes_of_nothing(idle_machine: FakeMachine) -> None:
    assert look(idle_machine, "idle", 10, uptime=100) == []
    assert look(idle_machine, "idle", 10, uptime=699) == []
    assert len(look(idle_machine, "idle", 10, uptime=700)) == 1


@pytest.mark.parametrize(
    ("name", "script"),
    [("systemctl", "echo active"), ("who", "echo 'me pts/0'"), ("nvidia-smi", "echo 4711")],
    ids=["job", "login", "gpu"],
)
def test_whatever_happens_starts_the_minutes_again(idle_machine: FakeMachine, name: str, script: str) -> None:
    assert look(idle_machine, "idle", 10, uptime=100) == []
    idle_machine.fake(name, script)
    assert look(idle_machine, "idle", 10, uptime=10_000) == []
    idle_machine.fake(name, FREE[name])
    assert look(idle_machine, "idle", 10, uptime=10_060) == []
    assert len(look(idle_machine, "idle", 10, uptime=10_660)) == 1


def test_a_driver_that_is_gone_does_not_keep_a_machine_on(idle_machine: FakeMachine) -> None:
    idle_machine.fake("nvidia-smi", "echo 'NVIDIA-SMI has failed because'; exit 9")
    look(idle_machine, "idle", 1, uptime=100)
    assert len(look(idle_machine, "idle", 1, uptime=160)) == 1


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"FOURSTEP_SHUTDOWN": "yes"}, "FOURSTEP_SHUTDOWN is 'yes'; expected never, after-job or idle"),
        (
            {"FOURSTEP_SHUTDOWN": "idle", "FOURSTEP_IDLE_MINUTES": "0"},
            "FOURSTEP_IDLE_MINUTES is '0'; expected",
        ),
        (
            {"FOURSTEP_SHUTDOWN": "idle", "FOURSTEP_IDLE_MINUTES": "soon"},
            "FOURSTEP_IDLE_MINUTES is 'soon'; expected",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    idle_machine: FakeMachine, environment: dict[str, str], sentence: str
) -> None:
    done = idle_machine.run(DEPLOY / "idle.sh", **environment)
    assert done.returncode == 2 and sentence in done.stderr and not idle_machine.called("shutdown")
