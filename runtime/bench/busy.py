"""What a GPU was busy with, from the kernels that a profiler saw. No torch.

Kernels are told apart by name: attention, products, everything else. Names are those of cuDNN, cuBLAS,
CUTLASS, flash-attn, SageAttention, torch and our own; one that is none of them counts as everything else,
so that the rest is never made to look small.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Kind = Literal["attention", "products", "other"]

_ATTENTION = re.compile(
    r"flash|fmha|sdpa|attention|attn|attend|mha_|_spread|eight_bits|_columns|_restore|sage|quantint8|meanscale"
    r"|transposepadpermute|quant_per|submean",
    re.IGNORECASE,
)
_PRODUCT = re.compile(
    r"gemm|nvjet|cutlass|scaled_mm|xmma|cublas|splitk|_pointers_kernel|_descriptors_kernel|w8a8|_int_mm",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel: seconds since the profile began, and seconds that it took."""

    name: str
    start: float
    seconds: float

    @property
    def kind(self) -> Kind:
        """What it belongs to; attention first, as CUTLASS makes attention kernels too."""
        if _ATTENTION.search(self.name):
            return "attention"
        return "products" if _PRODUCT.search(self.name) else "other"


@dataclass(frozen=True)
class Busy:
    """Seconds of one forward by what the GPU was busy with; self and cross None where not told apart."""

    attention: float
    products: float
    other: float
    of_tokens: float | None
    on_text: float | None
    kernels: int
    top: tuple[tuple[str, int, float], ...]  # name, runs, seconds


def busy(kernels: Sequence[Kernel], blocks: int, top: int = 12) -> Busy:
    """Add up the kernels of a forward of `blocks` blocks.

    The stream has attention in runs with products between them. Where the runs divide evenly among the
    blocks, the longest of each block and what comes before it (an attention in 8 bits rotates its keys' mean
    by a small product) is its self attention, and the rest is on the text.
    """
    inorder = sorted(kernels, key=lambda kernel: kernel.start)
    seconds: dict[Kind, float] = {"attention": 0.0, "products": 0.0, "other": 0.0}
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in inorder:
        seconds[kernel.kind] += kernel.seconds
        by_name[kernel.name].append(kernel.seconds)
    runs = [
        sum(kernel.seconds for kernel in run)
        for kind, run in groupby(
            (kernel for kernel in inorder if kernel.kind != "other"), key=lambda kernel: kernel.kind
        )
        if kind == "attention"
    ]
    apart = blocks > 0 and len(runs) >= 2 * blocks and len(runs) % blocks == 0
    each = len(runs) // blocks if apart else 1
    of_blocks = (runs[first : first + each] for first in range(0, len(runs), each))
    of_tokens = sum(_of_tokens(block) for block in of_blocks) if apart else None
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
    return Busy(
        **seconds,
        of_tokens=of_tokens,
        on_text=None if of_tokens is None else seconds["attention"] - of_tokens,
        kernels=len(inorder),
        top=tuple((name, len(times), sum(times)) for name, times in ranked),
    )


def _of_tokens(runs: Sequence[float]) -> float:
    """Of a block's runs of attention, in order, those up to the longest."""
    return sum(runs[: runs.index(max(runs)) + 1])
