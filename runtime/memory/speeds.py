"""What a machine computes and copies in a second: from its profile, or by compute capability; torch-free.

A profile's `speeds` are what operations sustain, not what a data sheet promises. Only the H200's were
measured (README, field-notes 2d). For the others they are derived: SM count x clock x operations of one SM
in a cycle (GeForce halves FP8 with fp32 accumulation, and so does GeForce Ampere bf16), times the share of
its own peak that the H200 reached with the same operation; see `SUSTAINED`.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf

from runtime.schema import CardSpeeds, Profile

TERA, GIGA = 1e12, 1e9

SUSTAINED = {"fp8": 0.66, "int8": 0.45, "bf16": 0.70, "attention": 0.58, "memory": 0.89, "pcie": 0.87}
"""Share of the H200's peaks that it sustained (1,300 of 1,979 fp8, 880 of 1,979 int8, 690 of 989 bf16, 575
of 989 for SDPA, 4.27 of 4.8 TB/s, 55 of 63 GB/s): with it the profiles' figures were derived from data
sheets."""

ATTENTION_SHARE = SUSTAINED["attention"] / SUSTAINED["bf16"]
"""Attention over bf16 products, where a profile states no figure for attention."""

DISK = 2.0 * GIGA
"""A disk that nobody measured: a plain NVMe drive, O_DIRECT, large reads."""

RAM_COPY = 8.0 * GIGA
"""Bytes a second that the reader threads copy from cached blocks into the ring: a desktop's memcpy, two
threads."""

PAGEABLE = 0.4
"""Share of the link's speed that a copy from memory that is not pinned gets: the driver stages it once
more."""


@dataclass(frozen=True)
class Speeds:
    """Operations a second (a multiply and an add are two) and bytes a second.

    measured: whether somebody measured the card's figures on such a card; source: where they come from.
    disk_known: whether `disk` was measured here. fused: whether Triton's kernels do what lies between the
    products, in one pass each and without tensors in between; else plain torch does.
    """

    fp8: float
    int8: float
    bf16: float
    attention: float
    memory: float
    pcie: float
    disk: float
    ram_copy: float
    measured: bool
    source: str
    disk_known: bool = False
    fused: bool = True

    def matmul(self, quantization: str) -> float:
        """Operations a second of the block matrices' products; fp16 as bf16, fp32 at half of it."""
        if quantization == "fp32":
            return self.bf16 / 2
        return {"fp8": self.fp8, "int8": self.int8}.get(quantization, self.bf16)

    def copied_to_gpu(self, pinned: bool) -> float:
        """Bytes a second from the ring to the GPU."""
        return self.pcie * (1.0 if pinned else PAGEABLE)


def _card(fp8: float | None, int8: float, bf16: float, memory: float) -> CardSpeeds:
    return CardSpeeds(
        fp8_tflops=fp8,
        int8_tflops=int8,
        bf16_tflops=bf16,
        memory_gbps=memory,
        measured=False,
        source="the slowest card of its compute capability that a profile describes",
    )


# capability from which on -> (speeds, PCIe GB/s): what a profile gets that states none. Of every generation
# the smallest card, so that a prediction errs on the slow side.
BY_CAPABILITY: tuple[tuple[tuple[int, int], CardSpeeds, float], ...] = (
    ((12, 0), _card(40, 57, 22, 400), 27.4),  # RTX 5060 Ti, 36 SMs x 2.57 GHz, 448 GB/s
    ((10, 0), _card(1300, 880, 690, 4270), 55.0),  # data centre: at least an H200
    ((9, 0), _card(1300, 880, 690, 2980), 55.0),  # H100
    ((8, 9), _card(40, 54, 21, 242), 13.7),  # RTX 4060
    ((8, 6), _card(None, 46, 18, 320), 27.4),  # RTX 3060
    ((8, 0), _card(None, 281, 218, 1385), 27.4),  # A100 of 40 GB
    ((7, 5), _card(None, 40, 15, 260), 13.7),  # RTX 2060; int8 units, fp16 in the place of bf16
)

PROCESSOR = CardSpeeds(
    fp8_tflops=None,
    int8_tflops=0.05,
    bf16_tflops=0.2,
    attention_tflops=0.1,
    memory_gbps=10,
    measured=False,
    source="a guess at a desktop processor",
)
"""A CPU, in the one dtype that it computes in (fp32 goes at half of `bf16_tflops`)."""


def speeds_of(profile: Profile, disk: float | None = None, *, here: bool = False) -> Speeds:
    """The speeds of the card that `profile` describes, and of `disk` bytes a second where they were measured.

    here: the card is in this machine, so it counts whether Triton is installed; elsewhere it is taken to be.

    A profile without `speeds` or `pcie_gbps` gets those of the slowest card of its compute capability, and
    one without compute capability (`auto` for a card that nobody knows) those of the slowest of all.
    """
    if profile.device == "cpu":
        card, pcie = profile.speeds or PROCESSOR, inf
    else:
        card, pcie = _by_capability(profile.capability)
        if profile.speeds is not None:
            card = profile.speeds
        if profile.pcie_gbps is not None:
            pcie = profile.pcie_gbps
    bf16 = card.bf16_tflops
    speeds = Speeds(
        # Without units for it an 8-bit matrix is multiplied as bf16.
        fp8=(card.fp8_tflops or bf16) * TERA,
        int8=(card.int8_tflops or bf16) * TERA,
        bf16=bf16 * TERA,
        attention=(card.attention_tflops or bf16 * ATTENTION_SHARE) * TERA,
        memory=card.memory_gbps * GIGA,
        pcie=pcie * GIGA,
        disk=DISK,
        ram_copy=RAM_COPY,
        measured=card.measured,
        source=card.source,
        fused=_has_kernels(profile, here),
    )
    return speeds if disk is None else replace(speeds, disk=disk, disk_known=True)


def _has_kernels(profile: Profile, here: bool) -> bool:
    """Whether the fused kernels can be expected: Ampere or newer, and Triton."""
    old = profile.capability is not None and profile.capability < (8, 0)
    return profile.device != "cpu" and not old and (not here or find_spec("triton") is not None)


def _by_capability(capability: tuple[int, int] | None) -> tuple[CardSpeeds, float]:
    for least, card, pcie in BY_CAPABILITY:
        if capability is not None and capability >= least:
            return card, pcie
    return BY_CAPABILITY[-1][1:]
