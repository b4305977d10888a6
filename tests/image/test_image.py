"""What the image is: its size, what lies in it, what it says of itself, and whether that is so."""

import json
import os
import re
from typing import Any

from entrypoint.surroundings import Image
from tests.image.conftest import IMAGE, ROOT, Bench, docker

BUDGET = 350e6  # bytes beyond the layer of locked wheels, base included


def sizes() -> list[tuple[int, str]]:
    """Bytes and command of every layer, newest first."""
    lines = docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", IMAGE
    ).stdout
    return [
        (int(size), command) for size, _, command in (line.partition("\t") for line in lines.splitlines())
    ]


def test_size_beyond_the_locked_wheels() -> None:
    layers = sizes()
    wheels = [size for size, command in layers if "--require-hashes" in command]
    assert len(wheels) == 1
    rest = sum(size for size, _ in layers) - wheels[0]
    for size, command in layers:
        if size:
            print(f"{size / 1e6:8.1f} MB  {command[:90]}")
    print(f"beyond the wheels: {rest / 1e6:.0f} MB of {BUDGET / 1e6:.0f}")
    assert rest <= BUDGET


def test_the_wheels_are_those_of_the_lock_and_ours(bench: Bench, promised: Image) -> None:
    code = """
import importlib.metadata, json
found = importlib.metadata.distributions()
print(json.dumps({one.metadata["Name"].lower().replace("_", "-"): one.version for one in found}))
"""
    listed = json.loads(bench.python(code))
    lock = dict(
        re.findall(r"^([a-z0-9.-]+)==(\S+)", (ROOT / f"locks/{promised.tag}.txt").read_text(), re.MULTILINE)
    )
    kernels = {"sageattention", "q8-matmul", "q8-kernels"}
    assert {name: version for name, version in listed.items() if name in lock} == lock
    assert set(listed) - set(lock) - kernels == {"fourstep", "pip"}


def test_nothing_is_left_of_the_build(bench: Bench) -> None:
    code = """
import pathlib, shutil
tools = [t for t in ("nvcc", "git", "g++", "cmake", "ninja", "ccache", "curl", "wget") if shutil.which(t)]
places = "/root/.cache /var/lib/apt/lists /var/cache/apt/archives /tmp /mnt /media /srv".split()
left = [str(f) for p in places for f in pathlib.Path(p).rglob("*") if f.is_file()]
left += [str(f) for f in pathlib.Path("/opt").iterdir() if f.name != "fourstep"]
left += [str(f) for f in pathlib.Path("/opt").rglob("*.whl")]
print(*tools, *left)
"""
    # As root, who sees everything.
    found = bench.run(
        "-c", code, entrypoint="python", flags=("--user", "0:0", "--cap-add", "DAC_READ_SEARCH")
    ).quiet()
    assert [line for line in found.stdout.split() if not line.endswith(("/lock", "/partial"))] == []


def test_labels_and_version_say_what_is_true(
    bench: Bench, inspected: dict[str, Any], promised: Image
) -> None:
    labels = inspected["Config"]["Labels"]
    assert {
        name: labels[f"fourstep.{name}"] for name in ("tag", "torch", "cuda", "driver", "minimum-driver")
    } == {
        "tag": promised.tag,
        "torch": promised.torch,
        "cuda": promised.cuda,
        "driver": promised.driver,
        "minimum-driver": promised.minimum_driver,
    }
    assert labels["fourstep.architectures"] == ";".join(promised.architectures)
    said = json.loads(bench.run("version", "--json").quiet().stdout)
    assert said["image"]["tag"] == promised.tag and said["cuda"] == promised.cuda
    assert said["image"]["architectures"] == list(promised.architectures)
    assert said["packages"]["torch"] == promised.torch
    assert said["revision"] == labels["org.opencontainers.image.revision"]
    assert said["version"] == labels["org.opencontainers.image.version"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", said["revision"])
    built = bench.python("import torch; print(torch._C._cuda_getArchFlags())").split()
    numbers = [f"{flag[3:-1]}.{flag[-1]}" for flag in built if flag.startswith("sm_")]
    assert numbers == list(promised.torch_architectures), "torch_architectures in profiles/images.yaml"


def test_no_secret_and_no_root(inspected: dict[str, Any]) -> None:
    config = inspected["Config"]
    told = "\n".join([*config["Env"], *(command for _, command in sizes())])
    assert not re.search(r"(?i)(token|password|passwd|secret_?key|credential)\w*=", told)
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["tini", "--", "t2v"] and not config["Cmd"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert environment["TRITON_CACHE_DIR"].startswith("/cache/") and environment["T2V_WEIGHTS"] == "/weights"


def test_triton_can_compile_its_launcher(bench: Bench) -> None:
    """With Triton's own compile function: gcc, Python.h, and a cache that code may be loaded from."""
    code = """
import importlib.util, pathlib, tempfile
from triton.runtime.build import _build
source = '''
#include <Python.h>
#include <math.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong((long)sqrt(1764.0)); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, 0}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", 0, -1, methods};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
'''
with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place, "launcher.c"); path.write_text(source)
    built = pathlib.Path(_build("launcher", str(path), place, [], [], []))
    kept = pathlib.Path("/cache", built.name); kept.write_bytes(built.read_bytes())
spec = importlib.util.spec_from_file_location("launcher", kept)
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
print(module.answer())
"""
    assert bench.python(code) == "42"


def test_two_builds_of_what_is_ours_give_the_same_layers(inspected: dict[str, Any], promised: Image) -> None:
    """The system layer and ours, built again without any cache. The wheels between them are the lock's."""
    base = inspected["Config"]["Labels"]["org.opencontainers.image.base.name"]
    flags = os.environ.get("DOCKER_FLAGS", "").split()
    tag = f"{IMAGE}-again"
    done = docker(
        *("build", "--no-cache", "--target", "base", "--file", ROOT / f"Dockerfile.{promised.tag}"),
        *("--build-arg", f"PYTHON_IMAGE={base}", "--tag", tag, *flags, ROOT),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(docker("image", "inspect", tag).stdout)[0]["RootFS"]["Layers"]
    docker("image", "rm", tag)
    assert again == inspected["RootFS"]["Layers"][: len(again)]
