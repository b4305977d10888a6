"""The machine code of our attention for Hopper, read with no card: does it spill, wait, mix up keys?"""

import importlib
import math
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.kernels import launch
from runtime.kernels.attention_quantize import slots

kernel: Any = None
missing = "interpreted: Gluon is only ever compiled"
if not launch.INTERPRETED:
    try:
        kernel = importlib.import_module("runtime.kernels.hopper_attention")
    except ImportError as error:
        missing = str(error)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(kernel is None, reason=missing)]


@cache
def built() -> tuple[str, int]:
    """(PTX, bytes of shared memory) for sm_90, as it is built at a launch: any number of rows and keys."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    keys, wide = kernel.KEYS, kernel.HEAD_DIM
    constants = {name: getattr(kernel, name) for name in ("GROUPS", "STAGES", "REGISTERS")}
    constants["LOG_SCALE"] = math.log2(kernel.WEIGHT_SCALE)
    tiles = {"q": (kernel.ROWS, wide), "k": (keys, wide), "v": (wide, keys)}
    signature = {name: f"tensordesc<fp8e4nv{[*tile]},{layout!r}>" for name, tile in tiles.items()}
    signature |= {"out": "*bf16", "center": "*fp32", "gain": "*fp32", "descale": "*fp32", "scale": "fp32"}
    signature |= {"rows": "i32", "keys": "i32", "stride": "i32"} | dict.fromkeys(constants, "constexpr")
    names = kernel._attend_kernel.arg_names
    signature = {name: signature[name] for name in names}
    aligned = ["out", "center", "gain", "descale", "stride"]
    attributes: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel._attend_kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "maxnreg": kernel.LAUNCH_REGISTERS}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(done.asm["cubin"]) > 1000
    return done.asm["ptx"], done.metadata.shared


def assemble(ptx: str, folder: Path) -> str:
    """What Triton's own assembler says of it."""
    import triton

    assembler = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    command = [str(assembler), "-v", "-arch=sm_90a", str(folder / "kernel.ptx"), "-o", str(folder / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def spilled(said: str) -> int:
    """Bytes that registers are moved out to memory and back."""
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found, said
    return sum(int(number) for pair in found for number in pair)


def serialized(said: str) -> list[str]:
    """Remarks about products that wait for each other; the assembler makes them unasked."""
    return [line for line in said.splitlines() if "wgmma" in line.lower() or "gmma" in line.lower()]


PRODUCT = r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3 \{([^}]*)\}, (\{[^}]*\}|%rd\d+),"


def test_it_is_built_once_for_all_lengths() -> None:
    """32,760 tokens do not divide by 16 and 75,600 do: each variant would take seconds to compile."""
    free = {one.name for one in kernel._attend_kernel.params if one.do_not_specialize}
    assert free >= {"rows", "keys"}


def test_the_kernel_compiles_without_spills_and_products_do_not_wait(tmp_path: Path) -> None:
    ptx, shared = built()
    said = assemble(ptx, tmp_path)
    print(f"{shared} bytes of shared memory; {said.strip().splitlines()[-3].strip()}")
    assert shared <= 227 * 1024
    assert spilled(said) == 0 and not serialized(said), said
    # The groups that loop: the two asked for, the first with what they and the loading warps leave.
    registers = [int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+);", ptx)]
    first = 65536 // 128 - sum(kernel.REGISTERS)
    assert {first, *kernel.REGISTERS} <= set(registers), registers
    # By TMA: queries of three groups; keys and values in the loop.
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)) == kernel.GROUPS + 2
    # Each product in each group, for the first tile and for the others: four instructions in a row.
    steps = re.findall(r"wgmma\.(fence|mma_async|commit_group|wait_group)", ptx)
    one = ["fence", *["mma_async"] * 4, "commit_group", "wait_group"]
    assert steps == one * (2 * 2 * kernel.GROUPS), steps
    for part in ptx.split("wgmma.fence")[1:]:
        into = [accumulator for accumulator, _ in re.findall(PRODUCT, part)]
        assert len(into) == 4 and len(set(into)) == 1, "one accumulator for the four"


def test_spills_and_waits_would_be_seen(tmp_path: Path) -> None:
    """Fewer registers spill; a look at the sums between two instructions makes the products wait."""
    ptx, _ = built()
    few = kernel.REGISTERS[0] - 24
    given = rf"(setmaxnreg\.inc\.sync\.aligned\.u32\s+){kernel.REGISTERS[0]};"
    tight = re.sub(given, rf"\g<1>{few};", ptx)
    lost = spilled(assemble(tight, tmp_path))
    print(f"with {few} registers {lost} bytes are spilled")
    assert tight != ptx and lost > 100
    second = [*re.finditer(PRODUCT + r"[^\n]*\n", ptx)][1]
    name = second.group(1).split(",")[0]
    looks = f"{ptx[: second.end()]}\tadd.f32 {name}, {name}, {name};\n{ptx[second.end() :]}"
    assert any("serialized" in line for line in serialized(assemble(looks, tmp_path)))


Set = tuple[int, str, list[str]]  # place of an instruction, its operation, its operands
READS = {"ex2": 1, "selp": 1, "fma": 2}  # operands through which a weight comes from its score


def definitions(ptx: str) -> dict[str, list[Set]]:
    """Each register, and the instructions that set it."""
    found: dict[str, list[Set]] = {}
    for line in re.finditer(r"^[ \t]*([a-z][\w.]*)[ \t]+(%\w+), ([^\n]*);", ptx, re.MULTILINE):
        found.setdefault(line.group(2), []).append((line.start(), line.group(1), line.group(3).split(", ")))
    return found


def score_of(register: str, place: int, found: dict[str, list[Set]], scores: dict[str, int]) -> int | None:
    """Which score a weight is exp2 of, through the scaling and the mask of the last tile."""
    if register in scores:
        return scores[register]
    before = [one for one in found.get(register, []) if one[0] < place]
    if not before:
        return None
    place, operation, operands = before[-1]
    reads = operands[: READS.get(operation.split(".")[0], 0)]
    held = (score_of(operand, place, found, scores) for operand in reads)
    return next((one for one in held if one is not None), None)


def test_the_code_gives_each_slot_the_weight_of_its_key() -> None:
    """From the registers of the first product, through exp2 and e4m3, to those of the second."""
    ptx, _ = built()
    found, order = definitions(ptx), slots(kernel.KEYS, torch.device("cpu")).tolist()
    four = r"cvt\.rn\.satfinite\.e4m3x2\.f32 \w+, (%\w+), (%\w+);"
    # Of two numbers the second goes to the low byte.
    packs = [
        (pack.start(), pack.group(5), [pack.group(i) for i in (2, 1, 4, 3)])
        for pack in re.finditer(four + r"\s*" + four + r"\s*mov\.b32 (%\w+),", ptx)
    ]
    products = [*re.finditer(PRODUCT, ptx)]
    followed = 0
    for at in range(0, len(products), 8):
        scores = {name: i for i, name in enumerate(products[at].group(1).split(","))}
        assert len(scores) == 64 and products[at].group(2).startswith("%rd")
        for instruction, product in enumerate(products[at + 4 : at + 8]):
            for register, name in enumerate(product.group(2).strip("{}").split(",")):
                place, _, weights = [p for p in packs if p[1] == name and p[0] < product.start()][-1]
                for byte, weight in enumerate(weights):
                    held = score_of(weight, place, found, scores)
                    assert held is not None, f"{weight} comes from no score"
                    assert held // 2 % 2 == register % 2, "another row"
                    for lane in range(4):
                        key = 8 * (held // 4) + 2 * lane + held % 2
                        slot = 32 * instruction + 16 * (register // 2) + 4 * lane + byte
                        assert order[slot] == key
                    followed += 1
    print(f"{followed} weights followed")
    assert followed == 64 * 2 * kernel.GROUPS
