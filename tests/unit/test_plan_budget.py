"""Where a budget comes from: what is free, what the profile and the user allow, and what is left alone."""

from pathlib import Path

import pytest

from runtime.errors import PlanError, RequestError
from runtime.memory.costs import CUDA_CONTEXT, GIB, MIB, RAM_MARGIN, VRAM_MARGIN
from runtime.memory.plan import Job
from runtime.memory.planning import budget_for, job_of, plan_run, sizes_for
from runtime.memory.speeds import ATTENTION_SHARE, BY_CAPABILITY, DISK, SUSTAINED, speeds_of
from runtime.profiles import list_profiles, load_manifest, load_profile, model_from_directory
from runtime.request import Request, check
from tests.fake_plans import computer

CARD = load_profile("rtx4070")  # 12 GiB
FP8 = load_manifest("wan2.1-t2v-14b-4step-fp8")
JOB = Job(480, 832, 81)


# ----------------------------------------------------------------------------------------------------- budget


def test_free_memory_below_the_profile_wins() -> None:
    for free in (6 * GIB, 9 * GIB, 11 * GIB):
        found = budget_for(CARD, computer(vram_free=free), "cuda:0")
        assert found.vram == free - VRAM_MARGIN - CUDA_CONTEXT
        assert "free on NVIDIA GeForce RTX 4070" in found.vram_source


def test_a_profile_is_a_ceiling_on_a_larger_card() -> None:
    found = budget_for(CARD, computer(vram_free=80 * GIB), "cuda:0")
    assert found.vram == 12 * GIB - CUDA_CONTEXT
    assert found.vram_source == "profile rtx4070: 12 GiB"


def test_the_least_ceiling_counts() -> None:
    machine = computer(vram_free=11 * GIB, ram_available=30 * GIB)
    found = budget_for(CARD, machine, "cuda:0", vram=6, ram=4)
    assert (found.vram, found.ram) == (6 * GIB - CUDA_CONTEXT, 4 * GIB)
    assert (found.vram_source, found.ram_source) == ("--vram 6", "--ram 4")
    loose = budget_for(CARD, machine, "cuda:0", vram=100, ram=100)
    assert loose.vram == 11 * GIB - VRAM_MARGIN - CUDA_CONTEXT
    assert 30 * GIB - RAM_MARGIN <= loose.ram < 31 * GIB  # and what this process holds already


def test_cuda_that_has_started_is_not_counted_twice() -> None:
    machine = computer(vram_free=8 * GIB)
    fresh, started = (budget_for(CARD, machine, "cuda:0", cuda_started=one) for one in (False, True))
    assert started.vram == fresh.vram + CUDA_CONTEXT == 8 * GIB - VRAM_MARGIN


def test_a_full_card_is_refused_and_not_taken_for_a_processor() -> None:
    machine = computer(vram_free=200 * MIB)
    assert budget_for(CARD, machine, "cuda:0").vram == 1
    with pytest.raises(PlanError, match="GPU memory"):
        plan_run(FP8, CARD, JOB, machine, "cuda:0")


def test_a_card_that_is_not_here_is_taken_as_its_profile_says() -> None:
    found = budget_for(CARD, computer(ram_available=3 * GIB), "cuda:0", ram=16)
    assert found.vram == 12 * GIB - VRAM_MARGIN - CUDA_CONTEXT
    assert found.ram == 14 * GIB and "an eighth" in found.ram_source  # of that machine, not of this one
    assert found.pinned > 300 * MIB and found.pinned_source == "assumed"
    assert budget_for(CARD, None, "cuda:0").ram == 14 * GIB
    with pytest.raises(PlanError, match="--vram"):
        budget_for(load_profile("auto"), computer(), "cuda:0")
    assert budget_for(load_profile("auto"), computer(), "cuda:0", vram=8).vram == 8 * GIB - CUDA_CONTEXT


def test_what_can_be_pinned_is_what_was_found() -> None:
    assert budget_for(CARD, computer(vram_free=11 * GIB, pinnable=128 * MIB), "cuda:0").pinned == 128 * MIB
    assert budget_for(CARD, computer(vram_free=11 * GIB, pinnable=0), "cuda:0").pinned == 0
    assert budget_for(CARD, computer(vram_free=11 * GIB, pinnable=None), "cuda:0").pinned > 300 * MIB


def test_the_processor_has_no_gpu_memory() -> None:
    found = budget_for(load_profile("cpu"), computer(vram_free=11 * GIB), "cpu", ram=8)
    assert (found.vram, found.pinned, found.ram) == (0, 0, 8 * GIB)


# --------------------------------------------------------------------------------------------------- plan_run


def test_a_checked_request_becomes_a_job() -> None:
    asked = check(Request(height=720, width=1280, frames=49), FP8, "cuda:0")
    assert job_of(asked) == Job(720, 1280, 49, 4, 1, True)
    assert job_of(asked, encode_text=False).encode_text is False
    guided = check(Request(guidance=6.0), load_manifest("wan2.1-t2v-1.3b"), "cuda:0")
    assert job_of(guided).forwards == 2


def test_a_request_is_planned_with_the_profile_wishes_and_the_measured_disk() -> None:
    machine = computer(vram_free=40 * GIB, disk=0.5e9)
    large = load_profile("rtx5090").model_copy(update={"vram_gb": None})
    made = plan_run(FP8, large, check(Request(), FP8, "cuda:0"), machine, "cuda:0")
    assert made.text == "resident" and made.vae_stays
    assert made.inputs.speeds.disk == 0.5e9 and made.inputs.speeds.disk_known
    assert made.seconds["text"].limit == "disk"


def test_other_variants_are_advised_with_their_names() -> None:
    bf16 = load_manifest("wan2.1-t2v-14b-4step-bf16")
    with pytest.raises(PlanError, match=r"--model wan2\.1-t2v-14b-4step-(fp8|int8)"):
        plan_run(bf16, CARD, JOB, computer(vram_free=11 * GIB), "cuda:0", vram=2.9)


def test_a_bare_directory_needs_its_files(tmp_path: Path) -> None:
    manifest = model_from_directory(tmp_path, CARD)
    with pytest.raises(RequestError, match="from its files alone"):
        sizes_for(manifest, CARD)


# ----------------------------------------------------------------------------------------------------- speeds


def test_every_profile_says_where_its_speeds_come_from() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        speeds = speeds_of(profile)
        assert min(speeds.fp8, speeds.int8, speeds.bf16, speeds.attention, speeds.memory, speeds.pcie) > 0
        assert speeds.source and speeds.measured == (name == "h200")
        if profile.device == "cuda":
            assert profile.speeds is not None and profile.pcie_gbps is not None, name
            assert (profile.speeds.fp8_tflops is None) == (profile.capability < (8, 9)), name


def test_an_old_profile_gets_the_slowest_card_of_its_generation() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        if profile.device != "cuda":
            continue
        own = speeds_of(profile)
        old = speeds_of(profile.model_copy(update={"speeds": None, "pcie_gbps": None}))
        for field in ("fp8", "int8", "bf16", "attention", "memory", "pcie"):
            assert getattr(old, field) <= 1.03 * getattr(own, field), (name, field)
        assert not old.measured
    assert [least for least, _, _ in BY_CAPABILITY] == sorted((c for c, _, _ in BY_CAPABILITY), reverse=True)


def test_no_fp8_units_means_bf16_products() -> None:
    ampere = speeds_of(load_profile("rtx3090"))
    assert ampere.fp8 == ampere.bf16 and ampere.matmul("fp8") == ampere.bf16 < ampere.matmul("int8")
    assert ampere.matmul("fp16") == ampere.bf16 == 2 * ampere.matmul("fp32")


def test_derived_speeds_are_the_h200_shares_of_a_data_sheet() -> None:
    """An Ada card of 128 SMs at 2.52 GHz: 330.3 TFLOP/s fp8 with fp32 sums, 660.6 TOPS int8, 165.2 bf16."""
    speeds = load_profile("rtx4090").speeds
    assert speeds is not None
    for found, peak, kind in (
        (speeds.fp8_tflops, 330.3, "fp8"),
        (speeds.int8_tflops, 660.6, "int8"),
        (speeds.bf16_tflops, 165.2, "bf16"),
        (speeds.memory_gbps, 1008, "memory"),
    ):
        assert found == pytest.approx(peak * SUSTAINED[kind], rel=0.01)
    assert speeds_of(load_profile("rtx4090")).attention == pytest.approx(116e12 * ATTENTION_SHARE, rel=0.01)


def test_a_disk_that_was_not_measured_is_an_ordinary_one() -> None:
    assert speeds_of(CARD).disk == DISK and not speeds_of(CARD).disk_known
    assert speeds_of(CARD, 5e9).disk == 5e9


def test_pageable_copies_are_slower() -> None:
    assert speeds_of(CARD).copied_to_gpu(pinned=False) < 0.5 * speeds_of(CARD).copied_to_gpu(pinned=True)
