"""The tiles of the 8-bit product: candidates for each kind of GPU, and which one is in use.

A tile of (rows, columns) of y is summed over slices of `depth`; `stages` slices of both operands lie in
shared memory at once, one byte a number: stages * (rows + columns) * depth bytes, of which a program may
have 163 KiB on sm_80, 227 KiB on sm_90 and 99 KiB on sm_86, 89 and 120.

`candidates` is what a tuner times (`runtime.kernels.tune`), `use` keeps its answer for this process,
`chosen` is what runs. Nothing here is stored: who tunes also remembers.
"""

from dataclasses import dataclass

import torch

from runtime.kernels.launch import HAS_DESCRIPTORS, capability


@dataclass(frozen=True, order=True)
class Config:
    """One way to cut the product into tiles.

    Attributes:
        rows, columns: of y in one tile. depth: of K in one slice; powers of two, depth at least 32.
        group: tiles of rows that are visited before the next column of tiles.
        warps, stages: of 32 threads each; slices in shared memory at once.
        descriptors: load with the bulk copy engine (sm_90 and newer). programs: then, how many each
            multiprocessor keeps.
    """

    rows: int
    columns: int
    depth: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    descriptors: bool = False
    programs: int = 1

    def __str__(self) -> str:
        """128x256x128 g8 w8 s3, with `tma` for descriptors."""
        how = f" tma{self.programs}" if self.descriptors else ""
        return f"{self.rows}x{self.columns}x{self.depth} g{self.group} w{self.warps} s{self.stages}{how}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the slices; Triton adds some where its epilogue does not fit in them."""
        return self.stages * (self.rows + self.columns) * self.depth


_BIG_SHARED = (  # sm_80
    Config(128, 256, 64, stages=4),
    Config(128, 256, 64, stages=3),
    Config(128, 128, 128, stages=3),
    Config(128, 128, 64, warps=4, stages=4),
    Config(256, 128, 64, stages=3),
    Config(64, 128, 128, warps=4, stages=3),
)
_SMALL_SHARED = (  # sm_86, sm_89, sm_120
    Config(128, 128, 64, stages=4),
    Config(128, 256, 64, stages=3),
    Config(256, 128, 64, stages=3),
    Config(128, 128, 128, stages=3),
    Config(128, 128, 64, warps=4, stages=3),
    Config(128, 64, 64, warps=4, stages=4),
    Config(64, 128, 128, warps=4, stages=3),
)
_HOPPER = (
    Config(128, 256, 128, stages=3),
    Config(128, 256, 128, stages=4),
    Config(128, 256, 128, group=16, stages=4),
    Config(128, 256, 64, stages=4),
    Config(256, 128, 128, stages=3),
    Config(128, 128, 128, warps=4, stages=4),
    Config(128, 128, 128, warps=8, stages=4),
)
_DESCRIPTORS = (
    # The first is the default: the fastest of all on an H200 for int8, at every shape of the 14B model.
    Config(128, 128, 128, warps=4, stages=3, descriptors=True, programs=2),
    Config(128, 256, 128, stages=3, descriptors=True),
    Config(128, 256, 128, stages=4, descriptors=True),
    Config(128, 256, 128, group=16, stages=4, descriptors=True),
    Config(256, 128, 128, stages=4, descriptors=True),
    Config(128, 128, 128, warps=4, stages=4, descriptors=True),
)


def candidates(arch: tuple[int, int], dtype: torch.dtype, descriptors: bool) -> tuple[Config, ...]:
    """What is worth timing on a compute capability; the first is the default. No e4m3 below sm_89.

    descriptors: whether this Triton has them.
    """
    if arch < (8, 0) or (dtype != torch.int8 and arch < (8, 9)):
        return ()
    if arch[0] == 9:
        return (*(_DESCRIPTORS if descriptors else ()), *_HOPPER)
    return _BIG_SHARED if arch == (8, 0) or arch[0] == 10 else _SMALL_SHARED


_Key = tuple[torch.device, torch.dtype, int, int]
_used: dict[_Key, Config] = {}


def use(config: Config | None, device: torch.device, dtype: torch.dtype, columns: int, depth: int) -> None:
    """From now on, products with a w of (columns, depth) on this device take `config`; None: the default."""
    key = (device, dtype, columns, depth)
    if config is None:
        _used.pop(key, None)
    else:
        _used[key] = config


def chosen(device: torch.device, dtype: torch.dtype, columns: int, depth: int) -> Config:
    """The config in use for such a product."""
    known = _used.get((device, dtype, columns, depth))
    return known or candidates(capability(device), dtype, HAS_DESCRIPTORS)[0]
