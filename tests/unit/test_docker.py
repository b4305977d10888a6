"""The images' files, held together: two Dockerfiles, the data file, the locks, compose and the page."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from entrypoint.cli import cli
from entrypoint.surroundings import images

ROOT = Path(__file__).resolve().parents[2]
DATA: dict[str, Any] = yaml.safe_load((ROOT / "profiles/images.yaml").read_text())
TAGS = [image.tag for image in images()]
END_OF_PINS = "# ---- end of pins\n"
LOCKS = ("cpu", "dev", "test", "kernels", *TAGS)
MOUNTED = {"WEIGHTS", "CACHE"}  # where compose mounts them is not for the host to say


def dockerfile(tag: str) -> tuple[str, str]:
    """Its pins and the rest."""
    pins, end, rest = (ROOT / f"Dockerfile.{tag}").read_text().partition(END_OF_PINS)
    assert end, f"Dockerfile.{tag} has no end of its pins"
    return pins, rest


def arguments(text: str) -> dict[str, str]:
    """ARG NAME=VALUE of a part of a Dockerfile."""
    return {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE)}


def instructions(text: str) -> list[str]:
    """The instructions of a Dockerfile, continuation lines joined, comments gone."""
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def requirements(name: str) -> dict[str, tuple[str, int]]:
    """Version, and number of hashes, by package of a lock."""
    text = (ROOT / f"locks/{name}.txt").read_text()
    entries = re.findall(
        r"^([a-z0-9._-]+)==(\S+)((?: *\\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)), (
        f"an entry of {name}.txt has no hash"
    )
    return {package: (version, hashes.count("sha256:")) for package, version, hashes in entries}


def compose() -> dict[str, Any]:
    """compose.yaml with its anchor merged."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


# ------------------------------------------------------------------------------------------- Dockerfiles


def test_the_dockerfiles_are_one_text_below_their_pins() -> None:
    first, *others = TAGS
    for other in others:
        assert dockerfile(other)[1] == dockerfile(first)[1]
        assert arguments(dockerfile(other)[0]).keys() == arguments(dockerfile(first)[0]).keys()
    assert sorted(path.name for path in ROOT.glob("Dockerfile.*")) == [
        f"Dockerfile.{tag}" for tag in sorted(TAGS)
    ]


@pytest.mark.parametrize("image", images(), ids=TAGS)
def test_pins_are_those_of_the_data_file(image: Any) -> None:
    pins = arguments(dockerfile(image.tag)[0])
    pins["CUDA_IMAGE"] = pins["CUDA_IMAGE"].partition("@")[0]  # a release adds the digest
    assert pins == {
        "TAG": image.tag,
        "TORCH": image.torch,
        "CUDA": image.cuda,
        "CUDA_IMAGE": image.cuda_image,
        "ARCHITECTURES": ";".join(image.architectures),
        "DRIVER": image.driver,
        "MINIMUM_DRIVER": image.minimum_driver,
    }
    assert image.cuda_image.startswith(f"nvidia/cuda:{image.cuda}.")
    for architecture in image.architectures:  # a card with compiled kernels must be one that torch runs on
        assert image.computes_on(tuple(map(int, architecture.split("."))))
    if image.cuda < "12.8":  # nvcc refuses it, and SageAttention's build with it
        assert "12.0" not in image.architectures


def test_kernels_are_built_from_the_commits_of_the_data_file() -> None:
    pins, rest = dockerfile(TAGS[0])
    stages = arguments(rest)
    for name, kernel in DATA["kernels"].items():
        assert stages[f"{name.upper()}_COMMIT"] == kernel["commit"]
        assert re.fullmatch("[0-9a-f]{40}", kernel["commit"])
        assert stages[name.upper()] == ("on" if kernel["default"] else "off")
        assert f'{kernel["source"]} "${name.upper()}_COMMIT"' in rest
        assert {f"FROM toolkit AS {name}-on", f"FROM base AS {name}-off"} <= set(rest.splitlines())
    for name, value in (arguments(pins) | stages).items():  # empty, or without @, until a release has seen it
        if name.endswith("_SHA256"):
            assert re.fullmatch("([0-9a-f]{64})?", value)
        if name.endswith("_IMAGE"):
            assert re.fullmatch(r"[a-z/]+:[a-z0-9.-]+(@sha256:[0-9a-f]{64})?", value)


def test_what_is_copied_is_in_the_build_context() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    for tag in TAGS:
        for line in instructions(dockerfile(tag)[1]):
            sources = line.split()[1:-1] if line.startswith("COPY ") and "--from" not in line else []
            sources += re.findall(r"type=bind,source=([\w/]+)", line)
            for source in (source.replace("${TAG}", tag) for source in sources):
                assert source == "." or source.split("/")[0] in allowed, line
                assert (ROOT / source).exists(), line
    for name in ("weights", "outputs", ".env", ".git", ".venv"):
        assert name not in allowed


def test_the_final_image_runs_as_anyone_and_takes_signals() -> None:
    rest = dockerfile(TAGS[0])[1]
    runtime = rest[rest.index("AS runtime\n") : rest.index("FROM runtime AS test")]
    lines = instructions(runtime)
    assert 'ENTRYPOINT ["tini", "--", "t2v"]' in lines
    assert "USER 1000:1000" in lines and not [line for line in lines if "root" in line]
    assert instructions(rest)[-1] == "FROM runtime"
    assert "FROM deps AS runtime" in rest, "gigabytes of wheels are not copied a second time"
    for line in instructions(rest):
        if "pip install" in line:
            assert "--require-hashes" in line
    for secret in ("TOKEN", "PASSWORD", "SECRET"):
        assert secret not in rest


# ------------------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_has_hashes(name: str) -> None:
    assert all(count >= 1 for _, count in requirements(name).values())
    assert sorted(f"{name}.txt" for name in LOCKS) == sorted(
        path.name for path in (ROOT / "locks").glob("*.txt")
    )


@pytest.mark.parametrize("image", images(), ids=TAGS)
def test_an_images_lock_is_its_torch_and_what_the_tests_run_with(image: Any) -> None:
    lock, tested = requirements(image.tag), requirements("cpu")
    assert lock["torch"][0] == image.torch
    assert lock["nvidia-cuda-runtime-cu12"][0].startswith(f"{image.cuda}.")
    assert "triton" in lock and "setuptools" in lock  # Triton uses it, and our wheel is built with it
    assert lock["nvidia-cudnn-frontend"][0] == "1.18.0"  # proven on a card; the extra `kernels`
    differing = {name for name in tested if lock.get(name, tested[name])[0] != tested[name][0]}
    assert differing <= {"sympy"}, "torch 2.6 pins its own; everything else is what the tests ran with"
    assert set(tested) <= set(lock)


def test_torch_is_in_no_lock_of_a_checkout() -> None:
    assert not [name for name in ("cpu", "dev", "test", "kernels") if "torch" in requirements(name)]


def test_the_kernels_are_built_with_what_their_build_section_asks_for() -> None:
    lock = requirements("kernels")
    caps = {"setuptools": 75, "wheel": 0.44, "packaging": 24}
    for name, below in caps.items():
        assert float(".".join(lock[name][0].split(".")[:2])) < below


# ---------------------------------------------------------------------------------------------- compose


def test_only_pull_has_a_network_and_may_write_weights() -> None:
    services = compose()["services"]
    assert list(services) == ["t2v", "doctor", "pull", "demo"]
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"] and service["shm_size"] and service["stop_grace_period"] == "30s"
        assert service["user"] == "${UID:-1000}:${GID:-1000}"
        assert service["network_mode"] == ("bridge" if name == "pull" else "none")
        targets = {volume.partition(":/")[2] for volume in service["volumes"]}
        assert ("weights" in targets) == (name == "pull")
        assert ("weights:ro" in targets) == (name in ("t2v", "doctor"))
        assert not targets - {"weights", "weights:ro", "outputs", "cache"}
        gpu = service["deploy"].get("resources", {}).get("reservations", {}).get("devices")
        assert bool(gpu) == (name in ("t2v", "doctor"))
        if gpu:
            assert gpu[0] == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_services_start_commands_that_exist() -> None:
    for service in compose()["services"].values():
        words = service.get("entrypoint", ["tini", "--", "t2v"])
        assert words[:3] == ["tini", "--", "t2v"]
        command: Any = cli
        for word in words[3:]:
            if word.startswith("-"):
                break
            command = command.commands[word]


def settings(command: click.Command) -> set[str]:
    return {f"T2V_{option.name}".upper() for option in command.params if isinstance(option, click.Option)}


@pytest.mark.parametrize(("service", "verb"), [("t2v", ["generate"]), ("pull", ["weights", "pull"])])
def test_any_option_can_be_set_in_the_environment(service: str, verb: list[str]) -> None:
    command: Any = cli
    for word in verb:
        command = command.commands[word]
    passed = {name for name in compose()["services"][service]["environment"] if name.startswith("T2V_")}
    wanted = settings(command) - {f"T2V_{name}" for name in MOUNTED}
    assert passed == wanted, "compose.yaml names every option under environment:"


def test_secrets_reach_pull_alone() -> None:
    for name, service in compose()["services"].items():
        assert ("HF_TOKEN" in service["environment"]) == (name == "pull")


def test_env_example_names_what_compose_reads() -> None:
    text = (ROOT / "compose.yaml").read_text()
    known = set(re.findall(r"\$\{(\w+):-", text))
    known |= {name for service in compose()["services"].values() for name in service["environment"]}
    named = set(re.findall(r"^# ([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert named <= known and set(re.findall(r"\$\{(\w+):-", text)) <= named
    assert not re.search(r"^[^#\n]", (ROOT / ".env.example").read_text(), re.MULTILINE), (
        "defaults are comments"
    )
    default = re.search(r"TAG:-(\w+)", text)
    assert default is not None and default[1] in TAGS


# ------------------------------------------------------------------------------------------------- page


def test_the_page_is_what_the_data_file_says() -> None:
    check = [sys.executable, str(ROOT / "docker/compatibility.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
