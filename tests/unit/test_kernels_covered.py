"""No kernel is forgotten: each is compiled for the cards and run beside its twin by tests that name it.

Kernels in Gluon are compiled for their card alone, and run on it alone: Triton's interpreter has no shared
memory, barriers or warp groups, of which they are made. Here their twins stand for them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.kernels import launch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "runtime" / "kernels"
COMPILED = ("test_kernels_compile.py", "test_cudnn_fp8.py", "test_kernels_covered.py")
INTERPRETED = ("kernels_in_interpreter.py", "attention_quantize_in_interpreter.py")
IN_GLUON = ("test_hopper_compiles.py",)
TRIAL = "_double_kernel"  # what `launch.trouble` runs on every card: nothing else depends on its numbers


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def kernels(tree: ast.AST) -> dict[str, set[str]]:
    """Each kernel that functions of a file launch or hand to what launches it, and those functions."""
    found: dict[str, set[str]] = {}
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id.endswith("_kernel"):
                found.setdefault(node.id, set()).add(function.name)
    return found


def written(tree: ast.AST, mark: str) -> set[str]:
    """Names of the functions under `@mark` or `@mark(...)`."""

    def name_of(one: ast.expr) -> str:
        return ast.unparse(one.func if isinstance(one, ast.Call) else one)

    return {one.name for one in functions(tree) if mark in map(name_of, one.decorator_list)}


def entries(names: set[str]) -> set[str]:
    """Those that are kernels by name; the others are their parts."""
    return {name for name in names if name.endswith("_kernel")}


def used(*files: Path) -> set[str]:
    """Every name that the code of files uses, imports and comments apart, and strings that are one name."""
    names: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def names_in(trees: list[ast.AST]) -> dict[str, set[str]]:
    """Each function of files, and the names that its body uses."""
    found: dict[str, set[str]] = {}
    for function in (function for tree in trees for function in functions(tree)):
        inside = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        found.setdefault(function.name, set()).update(inside)
    return found


def callers(name: str, uses: dict[str, set[str]]) -> set[str]:
    """`name` and every function through which it is reached within runtime/kernels."""
    reached = {name}
    while more := {function for function, names in uses.items() if names & reached} - reached:
        reached |= more
    return reached


def forgotten(folder: Path, compiled: set[str], run: set[str], in_gluon: set[str]) -> list[str]:
    """What is wrong with the kernels of a folder, in words."""
    trees: list[ast.AST] = [ast.parse(path.read_text()) for path in sorted(folder.glob("*.py"))]
    uses, wrong = names_in(trees), []
    launched = {name: by for tree in trees for name, by in kernels(tree).items()}
    plain, gluon = (set().union(*(written(tree, mark) for tree in trees)) for mark in ("jit", "gluon.jit"))
    for name in sorted(entries(plain | gluon)):
        if name not in launched:
            wrong.append(f"{name} is never launched")
            continue
        names, files = (in_gluon, IN_GLUON) if name in gluon else (compiled, COMPILED)
        if name not in names:
            wrong.append(f"{name} is compiled by none of {', '.join(files)}")
        ways = set().union(*(callers(function, uses) for function in launched[name]))
        if name not in {TRIAL, *gluon} and not ways & run:
            wrong.append(f"{name} runs in none of {', '.join(INTERPRETED)}")
    unknown = set(launched) - plain - gluon
    wrong += [f"{name} is launched but is no kernel here" for name in sorted(unknown)]
    for name in sorted((plain | gluon) - entries(plain | gluon)):
        if callers(name, uses) == {name}:
            wrong.append(f"{name} is a part of no kernel")
    return wrong


def test_every_kernel_is_compiled_and_run() -> None:
    named = [used(*(HERE / name for name in files)) for files in (COMPILED, INTERPRETED, IN_GLUON)]
    trees = [ast.parse(path.read_text()) for path in KERNELS.glob("*.py")]
    print("kernels:", *sorted(name for tree in trees for name in kernels(tree)))
    assert sum(len(kernels(tree)) for tree in trees) >= 12
    assert not forgotten(KERNELS, *named)


NEW = """
@jit
def _new_kernel(x):
    pass

@jit
def _part(x):
    pass

def new_triton(x):
    _new_kernel[(1,)](x)

def new(x):
    return new_triton(x)
"""


def test_a_new_kernel_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(NEW)
    said = "\n".join(forgotten(tmp_path, set(), set(), set()))
    assert "_new_kernel is compiled by none" in said and "_new_kernel runs in none" in said
    assert "_part is a part of no kernel" in said
    assert forgotten(tmp_path, {"_new_kernel"}, {"new"}, set()) == ["_part is a part of no kernel"]
    (tmp_path / "new.py").write_text(NEW.replace("_new_kernel[(1,)](x)", "_part(x)"))
    assert forgotten(tmp_path, {"_new_kernel"}, {"new"}, set()) == ["_new_kernel is never launched"]
    (tmp_path / "new.py").write_text(NEW.replace("@jit", "@other.jit"))
    assert forgotten(tmp_path, {"_new_kernel"}, {"new"}, set()) == [
        "_new_kernel is launched but is no kernel here"
    ]


def test_a_new_kernel_in_gluon_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(NEW.replace("@jit", "@gluon.jit(do_not_specialize=['rows'])"))
    part = "_part is a part of no kernel"
    said = forgotten(tmp_path, {"_new_kernel"}, {"new"}, set())
    assert said == [f"_new_kernel is compiled by none of {IN_GLUON[0]}", part]
    assert forgotten(tmp_path, set(), set(), {"_new_kernel"}) == [part]
    (tmp_path / "new.py").write_text(NEW.replace("@jit", "@gluon.jit").replace("    pass", "    _part(x)"))
    assert forgotten(tmp_path, set(), set(), {"_new_kernel"}) == []


@pytest.mark.skipif(not launch.HAS_TRITON or launch.INTERPRETED, reason="nothing to compile with")
def test_the_trial_kernel_compiles_for_every_card() -> None:
    from tests.unit.test_kernels_compile import ARCHS, build

    for arch in ARCHS:
        ptx, _ = build(launch._double_kernel, {"x": "*fp32"}, {"COUNT": 16}, arch, num_warps=1)
        assert f"sm_{arch}" in ptx
