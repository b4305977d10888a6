"""What runs inside an image build: sources by commit, the stream patch, architectures, the description."""

import importlib.util
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "docker"


def script(name: str) -> ModuleType:
    """A script of docker/ as a module; the directory is no package, because an image needs none of it."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: object, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "GIT_CONFIG_NOSYSTEM": "1"} | extra
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


# ------------------------------------------------------------------------------------------ stream patch

KERNELS = """\
#include <torch/extension.h>
template <int N, typename T> __global__ void one(T *x) {}
void launch(dim3 grid, dim3 block, size_t shared) {
  one<4, float><<<grid, block>>>(nullptr);
  one<4, c_type><<<dim3(div(a, b), 2), block, shared>>>(
      reinterpret_cast<float *>(x));
  DISPATCH(N, { \\
    func<<<grid, dim3(32, (A / B) * (C / D)), \\
           shared>>>(y); \\
  });
  int shifted = a << 3 >> 1;
}
"""


def test_every_launch_gets_the_current_stream() -> None:
    patch = script("kernels/use_current_stream")
    text, count = patch.patched(KERNELS)
    stream = "at::cuda::getCurrentCUDAStream()"
    assert count == 3
    assert f"one<4, float><<<grid, block, 0, {stream}>>>(nullptr);" in text
    assert f"one<4, c_type><<<dim3(div(a, b), 2), block, shared, {stream}>>>(" in text
    assert text.count(stream) == 3 and text.startswith("#include <ATen/cuda/CUDAContext.h>\n")
    assert "a << 3 >> 1" in text
    # A launch in a macro keeps its line continuations, or the macro would end there.
    macro = text[text.index("DISPATCH(N") :].splitlines()
    assert all(line.endswith("\\") for line in macro[:3])


def test_the_include_is_added_once_and_only_where_it_is_needed() -> None:
    patch = script("kernels/use_current_stream")
    line = "#include <ATen/cuda/CUDAContext.h>"
    assert patch.patched(f"{line}\nf<<<g, b>>>(x);")[0].count(line) == 1
    assert patch.patched("int x = 1;\n") == ("int x = 1;\n", 0)


@pytest.mark.parametrize(
    "source",
    ["f<<<grid>>>(x);", "f<<<g, b, s, stream>>>(x);", "f<<<g, b, >>>(x);", "f<<<g, b;", "<<<<<<g, b>>>"],
)
def test_a_launch_that_is_not_understood_ends_the_build(source: str, tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    file = tmp_path / "csrc/new.cu"
    file.write_text(f"g<<<a, b>>>(x);\n{source}\n")
    done = run(sys.executable, SCRIPTS / "kernels/use_current_stream.py", "csrc", cwd=tmp_path)
    assert done.returncode == 1 and "csrc/new.cu" in done.stderr and "Traceback" not in done.stderr
    assert "getCurrentCUDAStream" not in file.read_text()


def test_a_directory_without_launches_ends_the_build(tmp_path: Path) -> None:
    for name in ("csrc/fused", "csrc/moved"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "csrc/fused/fused.cu").write_text("f<<<g, b>>>(x);")
    (tmp_path / "csrc/moved/README.md").write_text("f<<<g, b>>>(x);")
    command = (sys.executable, SCRIPTS / "kernels/use_current_stream.py")
    assert run(*command, "csrc/fused", cwd=tmp_path).returncode == 0
    done = run(*command, "csrc/fused", "csrc/moved", cwd=tmp_path)
    assert done.returncode == 1  # already patched: four arguments are not patched twice
    (tmp_path / "csrc/fused/fused.cu").write_text("f<<<g, b>>>(x);")
    done = run(*command, "csrc/fused", "csrc/moved", cwd=tmp_path)
    assert done.returncode == 1 and "csrc/moved launches nothing" in done.stderr


# -------------------------------------------------------------------------------------------- sources


@pytest.fixture
def upstream(tmp_path: Path) -> tuple[Path, str]:
    """A repository with two commits; the first one's id."""
    repository = tmp_path / "upstream"
    repository.mkdir()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    run("git", "init", "--quiet", ".", cwd=repository)
    run("git", "config", "uploadpack.allowAnySHA1InWant", "true", cwd=repository)
    (repository / "setup.py").write_text("one\n")
    run("git", "add", ".", cwd=repository)
    run(*git, "commit", "--quiet", "-m", "one", cwd=repository)
    commit = run("git", "rev-parse", "HEAD", cwd=repository).stdout.strip()
    (repository / "setup.py").write_text("two\n")
    run(*git, "commit", "--quiet", "-am", "two", cwd=repository)
    return repository, commit


def test_a_source_is_the_commit_and_has_the_recorded_digest(
    tmp_path: Path, upstream: tuple[Path, str]
) -> None:
    repository, commit = upstream
    url = f"file://{repository}"

    def fetch(place: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / place).mkdir()
        return run("bash", SCRIPTS / "kernels/source.sh", *arguments, cwd=tmp_path / place)

    done = fetch("first", url, commit)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first/setup.py").read_text() == "one\n"
    digest = done.stdout.strip().rpartition("sha256:")[2]
    assert len(digest) == 64
    assert fetch("again", url, commit, digest).returncode == 0
    done = fetch("other", url, commit, "0" * 64)
    assert done.returncode == 1 and digest in done.stderr
    assert fetch("short", url, commit[:12]).returncode == 2
    assert fetch("absent", url, "1" * 40).returncode != 0


def test_a_submodule_must_be_at_its_commit(tmp_path: Path, upstream: tuple[Path, str]) -> None:
    repository, commit = upstream
    outer = tmp_path / "outer"
    outer.mkdir()
    run("git", "init", "--quiet", ".", cwd=outer)
    allow = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "protocol.file.allow",
        "GIT_CONFIG_VALUE_0": "always",
    }
    added = run("git", "submodule", "--quiet", "add", f"file://{repository}", "inner", cwd=outer, **allow)
    assert added.returncode == 0, added.stderr
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    run("git", *identity, "commit", "--quiet", "-m", "outer", cwd=outer)
    head = run("git", "rev-parse", "HEAD", cwd=repository).stdout.strip()
    right = run("bash", SCRIPTS / "kernels/submodule.sh", "inner", head, cwd=outer, **allow)
    assert right.returncode == 0, right.stderr
    wrong = run("bash", SCRIPTS / "kernels/submodule.sh", "inner", commit, cwd=outer, **allow)
    assert wrong.returncode == 1 and head in wrong.stderr and commit in wrong.stderr


# ------------------------------------------------------------------------------------- architectures


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "kernels-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kernels/_one.so", "one")
        archive.writestr("kernels/_two.so", "two")
        archive.writestr("kernels/__init__.py", "")
    return path


def fake_cuobjdump(place: Path, **listed: str) -> Path:
    """A cuobjdump that lists by the library's content."""
    program = place / "cuobjdump"
    cases = "".join(
        f'{name}) printf "ELF file    1: x.{arch}.cubin\\n" ;;\n' for name, arch in listed.items()
    )
    cases = "".join(
        f'{name}) for a in {archs}; do echo "ELF file 1: x.$a.cubin"; done ;;\n'
        for name, archs in listed.items()
    )
    program.write_text(f'#!/bin/sh\ncase $(cat "$2") in\n{cases}esac\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_every_library_must_hold_every_architecture(tmp_path: Path, wheel: Path) -> None:
    def checked(promised: str, **listed: str) -> subprocess.CompletedProcess[str]:
        fake_cuobjdump(tmp_path, **listed)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return run(
            sys.executable,
            SCRIPTS / "kernels/check_architectures.py",
            promised,
            wheel,
            cwd=tmp_path,
            PATH=path,
        )

    whole = "sm_80 sm_86 sm_89 sm_90a sm_120a"
    assert checked("8.0;8.6;8.9;9.0;12.0", one=whole, two=whole).returncode == 0
    # As a list split at blanks builds: the first architecture alone, without a word.
    done = checked("8.0;8.6;8.9;9.0", one=whole, two="sm_80")
    assert (
        done.returncode == 1 and "_two.so lacks 8.6, 8.9, 9.0" in done.stderr and "it has 8.0" in done.stderr
    )
    done = checked("8.9", one="", two="")
    assert done.returncode == 1 and "it has none" in done.stderr


def test_a_wheel_without_libraries_is_no_kernel(tmp_path: Path) -> None:
    path = tmp_path / "pure-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pure/__init__.py", "")
    fake_cuobjdump(tmp_path)
    done = run(
        *(sys.executable, SCRIPTS / "kernels/check_architectures.py", "8.9", path),
        cwd=tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode == 1 and "no compiled library" in done.stderr


# ------------------------------------------------------------------------------------------ description


def test_a_build_with_another_torch_than_promised_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = script("image/describe")
    pins = dict.fromkeys(describe.PINS, "x") | {"TORCH": "2.6.0", "CUDA": "12.4", "ARCHITECTURES": "8.0;8.9"}
    monkeypatch.setattr(describe, "version", lambda name: "2.6.0+cu124")
    monkeypatch.setattr(describe, "torch_built_for", lambda: "12.4")
    found = describe.describe(pins)
    assert found["architectures"] == ["8.0", "8.9"] and found["torch"] == "2.6.0" and found["kernels"] == {}
    for name, wrong in (("TORCH", "2.8.0"), ("CUDA", "12.8")):
        with pytest.raises(SystemExit, match=wrong.replace(".", r"\.")):
            describe.describe(pins | {name: wrong})


def test_the_scripts_are_bash_that_stops_at_the_first_fault() -> None:
    scripts = sorted(SCRIPTS.rglob("*.sh"))
    assert scripts
    for path in scripts:
        assert os.access(path, os.X_OK) and "set -euo pipefail\n" in path.read_text()
        assert run("bash", "-n", path, cwd=ROOT).returncode == 0
