"""The rules of the house, read from every file: which way imports point, and what a model file may say."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "entrypoint", "demo", "profiles")
MODEL_FILES = ("transformer", "text_encoder", "vae", "sampler")
STORY = {
    f"runtime.{name}"
    for name in (*MODEL_FILES, "tokenizer", "video", "video_writer", "pipeline", "loading", "parts", "frames")
}
TORCH_FREE = (
    *("errors", "schema", "profiles", "device", "request", "tokenizer"),
    *("memory.machine", "memory.ram", "memory.pinning", "memory.disk"),
    *("memory.plan", "memory.planning", "memory.exhausted", "memory.allocator", "memory.decode_costs"),
    *("layers.tiles", "whole_file", "tuning", "tuning_file"),
    *("lightx2v.config", "lightx2v.keys", "lightx2v.rules", "weights"),
)

# package or module -> what it must never import (a name stands for all below it)
FORBIDDEN: dict[str, set[str]] = {
    "runtime": {"entrypoint", "demo", "tests", "diffusers", "transformers"},
    "entrypoint": {"demo", "tests", "diffusers", "transformers"},
    "demo": {"entrypoint", "tests"},
    "runtime.linear": STORY | {"runtime.memory"},
    "runtime.memory": STORY,
    "runtime.checkpoint": STORY | {"runtime.memory"},
    "runtime.layers": STORY | {"runtime.linear", "runtime.memory", "runtime.checkpoint"},
    "runtime.kernels": STORY | {"runtime.layers", "runtime.memory", "runtime.checkpoint", "runtime.linear"},
    **{f"runtime.{name}": {"runtime.pipeline", "runtime.loading"} for name in TORCH_FREE},
}
NOT_IN_A_MODEL = {
    *("os", "pathlib", "logging", "io", "sys", "json", "safetensors", "subprocess"),
    *(f"runtime.{name}" for name in ("checkpoint", "linear", "memory", "device", "profiles", "schema")),
    *("runtime.loading", "runtime.pipeline", "runtime.request", "runtime.video", "runtime.video_writer"),
}
FORBIDDEN |= {f"runtime.{name}": NOT_IN_A_MODEL for name in MODEL_FILES}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as `package.module` (and `package.module.name`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which way they point"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_run_downhill(path: Path) -> None:
    name = module_name(path)
    names = set(imported(ast.parse(path.read_text())))
    for package, forbidden in FORBIDDEN.items():
        if within(name, package):
            wrong = sorted(one for one in names if any(within(one, other) for other in forbidden))
            assert not wrong, f"{name} imports {', '.join(wrong)}, which {package} must not"


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_file_is_parameters_blocks_and_forward(name: str) -> None:
    tree = ast.parse((ROOT / "runtime" / f"{name}.py").read_text())
    for node in ast.walk(tree):  # docstrings may say what the code may not
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    code = ast.unparse(tree).lower()
    for word in ("cuda", "quantiz", "environ", "getenv", "logging", "logger", "open(", "load("):
        assert word not in code, f"{name}.py says {word!r}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_the_shell_lives_in_entrypoint(path: Path) -> None:
    names = set(imported(ast.parse(path.read_text())))
    if not within(module_name(path), "entrypoint"):
        assert not {one.split(".")[0] for one in names} & {"click", "rich"}


def test_no_file_is_called_utils() -> None:
    assert not [path for path in sources() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_profiles_hold_no_code() -> None:
    assert [path.name for path in (ROOT / "profiles").rglob("*.py")] == ["__init__.py"]
    assert not (ROOT / "profiles" / "__init__.py").read_text().strip()


def test_what_answers_at_once_imports_no_torch() -> None:
    modules = ", ".join(f"runtime.{name}" for name in TORCH_FREE)
    code = f"import runtime, {modules}, entrypoint.cli, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert "runtime.profiles" in loaded
    assert not loaded & {"torch", "av", "safetensors.torch"}


def test_tests_on_a_card_need_no_conftest() -> None:
    """They run with --noconftest, on machines that have torch and pytest and little else."""
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    fixtures = {
        node.name
        for node in ast.parse(conftest).body
        if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(d) for d in node.decorator_list)
    }
    assert {"t2v", "tiny_checkpoint"} <= fixtures
    for path in (ROOT / "tests" / "gpu").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = set(imported(tree))
        assert not [name for name in names if within(name, "tests.conftest") or within(name, "hypothesis")], (
            path
        )
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        asked = {
            argument.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and (node.name.startswith("test_") or node.decorator_list)
            for argument in node.args.args
        }
        assert not (asked - own) & fixtures, (
            f"{path.name} asks for {(asked - own) & fixtures} of tests/conftest.py"
        )
