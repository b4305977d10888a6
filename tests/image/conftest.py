"""The finished image, run from outside: through compose where users go that way, with docker where they do.

    make image TAG=cu124 && make test-image TAG=cu124

IMAGE names the image (default fourstep:cu128). Without an engine, or without the image, everything here is
skipped and says why. Every run has the rights that compose.yaml gives: an arbitrary user, a read-only root,
no capabilities and no network.
"""

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from entrypoint.surroundings import Image, images

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("IMAGE", "fourstep:cu128")
PATIENCE = 600  # seconds; the demo needs ten of them on two idle cores
STRANGER = (4242, 4343) if os.getuid() == 0 else (os.getuid(), os.getgid())
"""A user that the image has never heard of; only root can make directories for one."""

TROUBLE = re.compile(r"\b(warn(ing)?s?|errors?|traceback|deprecat\w*|exception)\b", re.IGNORECASE)
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
    *("--network", "none", "--shm-size", "256m"),
)


def docker(*arguments: object, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """`docker ARGUMENTS`."""
    command = ["docker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _missing() -> str | None:
    if shutil.which("docker") is None:
        return "there is no docker here"
    if docker("info").returncode != 0:
        return "no engine answers (docker info)"
    if docker("image", "inspect", IMAGE).returncode != 0:
        return f"there is no image {IMAGE}: make image TAG={IMAGE.rpartition(':')[2]}"
    return None


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    """Skip everything with the reason where the image cannot be run."""
    missing = _missing()
    if missing is not None:
        pytest.skip(missing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of these is quick."""
    for item in items:
        item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Done:
    """A container that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def trouble(self) -> list[str]:
        """Lines on stderr that a user would worry about."""
        return [line for line in self.stderr.splitlines() if TROUBLE.search(line)]

    def quiet(self) -> "Done":
        """This, if it went well and without a word of warning."""
        assert self.code == 0, self.stderr
        assert not self.trouble, self.trouble
        return self


@dataclass(frozen=True)
class Bench:
    """One test's directories, and the image run on them."""

    outputs: Path
    weights: Path
    project: str

    def run(self, *arguments: object, flags: tuple[object, ...] = (), entrypoint: str | None = None) -> Done:
        """`docker run` as hardened as compose does it."""
        entry = ("--entrypoint", entrypoint) if entrypoint else ()
        done = docker("run", "--rm", *self.flags(), *flags, *entry, IMAGE, *arguments)
        return Done(done.returncode, done.stdout, done.stderr)

    def flags(self) -> tuple[object, ...]:
        """What every `docker run` here has."""
        mounts = (
            "-v",
            f"{self.outputs}:/outputs",
            "-v",
            f"{self.weights}:/weights:ro",
            "-v",
            f"{self.project}:/cache",
        )
        return (*HARDENED, "--user", f"{STRANGER[0]}:{STRANGER[1]}", *mounts)

    def python(self, code: str) -> str:
        """What a program in the image prints."""
        return self.run("-c", code, entrypoint="python").quiet().stdout.strip()

    def compose(self, *arguments: object, **extra: str) -> Done:
        """`docker compose ARGUMENTS` with this test's directories and user."""
        settings = {
            "TAG": IMAGE.rpartition(":")[2],
            "UID": str(STRANGER[0]),
            "GID": str(STRANGER[1]),
            "OUTPUTS": str(self.outputs),
            "WEIGHTS": str(self.weights),
        }
        command = [*_compose(), "-f", str(ROOT / "compose.yaml"), "-p", self.project, *map(str, arguments)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("T2V_")}
        done = subprocess.run(
            command,
            env=clean | settings | extra,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)


def _compose() -> list[str]:
    """Compose v2 where it is installed, else the program before it."""
    if docker("compose", "version").returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        pytest.skip("there is no docker compose here")
    return ["docker-compose"]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Fresh directories that belong to the stranger, and a cache volume that goes away."""
    tmp_path.chmod(0o755)
    made = Bench(tmp_path / "outputs", tmp_path / "weights", f"fourstep-test-{uuid.uuid4().hex[:8]}")
    for directory in (made.outputs, made.weights):
        directory.mkdir()
        if os.getuid() == 0:
            os.chown(directory, *STRANGER)
    yield made
    for name in docker("ps", "-aq", "--filter", f"name={made.project}").stdout.split():
        docker("rm", "-f", name)
    for volume in docker("volume", "ls", "-q", "--filter", f"name={made.project}").stdout.split():
        docker("volume", "rm", "-f", volume)


@pytest.fixture(scope="session")
def inspected(engine: None) -> dict[str, Any]:
    """`docker inspect` of the image."""
    found: list[dict[str, Any]] = json.loads(docker("image", "inspect", IMAGE).stdout)
    return found[0]


@pytest.fixture(scope="session")
def promised(inspected: dict[str, Any]) -> Image:
    """What profiles/images.yaml says of this image."""
    tag = inspected["Config"]["Labels"]["fourstep.tag"]
    return next(image for image in images() if image.tag == tag)
