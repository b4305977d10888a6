"""From a profile, a request and a machine to a plan: how the numbers of the budget come about.

The budget takes the least of what is free and of every ceiling (the profile's, --vram, --ram). What is free
keeps a margin, since others use the machine too; a ceiling is meant as it is said. Torch-free: opened files
are looked at through their headers alone, and only where they are given.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.errors import PlanError
from runtime.memory.account import CHUNK, CHUNKS
from runtime.memory.costs import CUDA_CONTEXT, GIB, MIB, RAM_MARGIN, VRAM_MARGIN
from runtime.memory.machine import Machine
from runtime.memory.plan import Budget, Job, Plan, Wish, make_plan
from runtime.memory.sizes import Header, ModelSizes, sizes_of_files, sizes_of_manifest
from runtime.memory.speeds import speeds_of
from runtime.profiles import list_manifests, load_manifest
from runtime.request import CheckedRequest
from runtime.schema import ModelManifest, Profile

SYSTEM_SHARE = 8
"""Of the RAM of a machine that is not here, one part in so many is left to its system."""

ASSUMED_RAM = 16 * GIB
STATM = Path("/proc/self/statm")


def plan_run(
    manifest: ModelManifest,
    profile: Profile,
    request: CheckedRequest | Job,
    machine: Machine | None,
    device: str,
    *,
    files: Sequence[Header] | None = None,
    vram: float | None = None,
    ram: float | None = None,
    encode_text: bool = True,
    cuda_started: bool = False,
    attention: str = "",
) -> Plan:
    """The plan for one video of `request` on `device` ("cpu" or "cuda:N").

    machine: what `runtime.memory.machine.look` found, with the GPU of `device`; without its GPU, or None,
    the plan is for the card that `profile` describes, wherever it is. files: the opened transformer, text
    encoder and VAE, else the manifest's sizes count. vram, ram: ceilings in GiB. encode_text: False when the
    text states are known. cuda_started: this process has its CUDA context already, so free memory no longer
    contains it. attention: the 8-bit backend that works on the GPU, if one does. Raises PlanError when
    nothing fits, RequestError when neither manifest nor files know the sizes.
    """
    job = request if isinstance(request, Job) else job_of(request, encode_text)
    sizes = sizes_for(manifest, profile, files)
    budget = budget_for(profile, machine, device, vram=vram, ram=ram, cuda_started=cuda_started)
    here = machine is not None and machine.gpu is not None
    speeds = speeds_of(profile, machine.disk if machine is not None else None, here=here)
    wish = Wish(profile.text_encoder.stay_on_gpu, profile.vae.stay_on_gpu, attention)
    try:
        return make_plan(sizes, job, budget, speeds, wish)
    except PlanError:
        others = _other_variants(manifest, profile)  # read only now: each is a file
        if not others:
            raise
        return make_plan(sizes, job, budget, speeds, replace(wish, alternatives=others))


def job_of(request: CheckedRequest, encode_text: bool = True) -> Job:
    """What a checked request asks of the machine."""
    forwards = 1 if request.guidance == 1 else 2
    return Job(request.height, request.width, request.frames, request.steps, forwards, encode_text)


def sizes_for(manifest: ModelManifest, profile: Profile, files: Sequence[Header] | None = None) -> ModelSizes:
    """The model's sizes as `profile` computes it, from its files where they are given."""
    if files is None:
        return sizes_of_manifest(manifest, profile.dtype, profile.vae.dtype)
    transformer, text_encoder, vae = files
    heads = None if manifest.transformer is None else manifest.transformer.num_heads
    return sizes_of_files(
        *(transformer, text_encoder, vae),
        text_len=manifest.sampling.text_len,
        num_heads=heads,
        dtype=profile.dtype,
        vae_dtype=profile.vae.dtype,
    )


def _other_variants(manifest: ModelManifest, profile: Profile) -> dict[str, ModelSizes]:
    """The other formats of the same model, smallest blocks first."""
    manifests = [load_manifest(name) for name in list_manifests()]
    found: dict[str | None, ModelManifest] = {}
    for other in manifests:
        if other.family == manifest.family and other.quantization != manifest.quantization:
            found.setdefault(other.quantization, other)
    sizes = {
        other.name: sizes_of_manifest(other, profile.dtype, profile.vae.dtype) for other in found.values()
    }
    return dict(sorted(sizes.items(), key=lambda one: one[1].blocks.matrices))


# ---------------------------------------------------------------------------------------------------- budget


def budget_for(
    profile: Profile,
    machine: Machine | None,
    device: str,
    *,
    vram: float | None = None,
    ram: float | None = None,
    cuda_started: bool = False,
) -> Budget:
    """The budget for `device`; arguments as for `plan_run`."""
    if device == "cpu":
        host, host_source = _ram(machine, ram, elsewhere=False)
        return Budget(0, host, 0, "computing on the CPU", host_source, "nothing to copy to")
    elsewhere = machine is None or machine.gpu is None
    gpu, gpu_source = _vram(profile, machine, vram, cuda_started)
    host, host_source = _ram(machine, ram, elsewhere=elsewhere)
    pinned, pinned_source = _pinned(machine)
    return Budget(gpu, host, pinned, gpu_source, host_source, pinned_source)


def _vram(
    profile: Profile, machine: Machine | None, ceiling: float | None, cuda_started: bool
) -> tuple[int, str]:
    """Bytes that torch may reserve, and where that comes from."""
    limits: list[tuple[int, str]] = []
    if machine is not None and machine.gpu is not None:
        free = machine.vram_free + (CUDA_CONTEXT if cuda_started else 0)
        limits.append((free - VRAM_MARGIN, f"{_gib(machine.vram_free)} free on {machine.gpu.name}"))
    elif profile.vram_bytes is not None:
        limits.append(
            (profile.vram_bytes - VRAM_MARGIN, f"{profile.name} with {_gib(profile.vram_bytes)} free")
        )
    if profile.vram_bytes is not None:
        limits.append((profile.vram_bytes, f"profile {profile.name}: {_gib(profile.vram_bytes)}"))
    if ceiling is not None:
        limits.append((int(ceiling * GIB), f"--vram {ceiling:g}"))
    if not limits:
        raise PlanError(
            f"Profile {profile.name} states no GPU memory and there is no GPU here to ask; give --vram, or a "
            "profile of `t2v profiles` that states it."
        )
    least, source = min(limits)
    # 0 would mean the CPU; a byte is as little and is refused with numbers.
    return max(least - CUDA_CONTEXT, 1), source


def _ram(machine: Machine | None, ceiling: float | None, *, elsewhere: bool) -> tuple[int, str]:
    """Bytes that this process may grow to, and where that comes from."""
    asked = None if ceiling is None else int(ceiling * GIB)
    if elsewhere and asked is not None:
        return asked - asked // SYSTEM_SHARE, f"a machine of {_gib(asked)}, an eighth of it for its system"
    if machine is None:
        return ASSUMED_RAM - ASSUMED_RAM // SYSTEM_SHARE, f"a machine of {_gib(ASSUMED_RAM)} is assumed"
    available = machine.ram_available + _resident_now() - RAM_MARGIN
    found = (available, f"{_gib(machine.ram_available)} available ({machine.ram_source})")
    least, source = min(found, (asked, f"--ram {ceiling:g}")) if asked is not None else found
    return max(least, 1), source


def _pinned(machine: Machine | None) -> tuple[int, str]:
    """Bytes that the ring may pin, and where that comes from."""
    wanted = CHUNK * CHUNKS
    if machine is None or machine.gpu is None:
        return wanted, "assumed"
    if machine.pinnable is None:
        # Not tried, or there is no way to try: the ring tries for itself and takes what it gets.
        return wanted, machine.pin_error or "not tried"
    return machine.pinnable, f"{machine.pinnable // MIB} MiB could be pinned"


def _resident_now() -> int:
    """Bytes of RAM that this process holds: they are not in what is available."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.4g} GiB"
