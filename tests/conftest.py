"""Fixtures that all tests share: the tiny checkpoint, once for each process, and the program run on it."""

import os
from collections.abc import Callable
from pathlib import Path

# Before torch: test processes run side by side, and threads that fight for two cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

from entrypoint import cache, output
from entrypoint.cli import cli
from tests import tiny

Run = Callable[..., Result]

# A gate must say the same of the same commit twice; a developer's machine may search on with new examples.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `tests.tiny`, with its bf16, fp8 and int8 variants. Read it, do not change it."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "weights")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no T2V_ setting, no volumes and an empty cache."""
    for name in [name for name in os.environ if name.startswith("T2V_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(cache, "CONTAINER_CACHE", tmp_path / "no-such-volume")
    place = tmp_path / "workplace"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(output, "CONTAINER_OUTPUTS", tmp_path / "no-such-volume")
    return place


@pytest.fixture
def t2v(workplace: Path) -> Run:
    """`t2v ARGUMENTS` in this process, in an empty directory; the result has exit_code, stdout and stderr."""

    def run(*arguments: object, **extra: object) -> Result:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], **extra)  # type: ignore[arg-type]
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def small(t2v: Run, tiny_checkpoint: Path) -> Run:
    """`t2v generate ARGUMENTS` with the tiny model and a small video, on the CPU."""
    sizes = [part for name, value in tiny.SMALL.items() for part in (f"--{name}", value)]

    def run(*arguments: object, model: Path = tiny_checkpoint, **extra: object) -> Result:
        return t2v("generate", "--model", model, "--device", "cpu", *sizes, *arguments, **extra)

    return run
