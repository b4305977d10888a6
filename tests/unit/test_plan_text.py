"""The text encoder in the plan: on the GPU, else in RAM when nothing else wants it, else read each time."""

from dataclasses import replace

import pytest

from runtime.errors import PlanError
from runtime.memory.change import change
from runtime.memory.plan import Budget, Plan, Wish, make_plan
from tests.unit.test_plan import GIB, IDLE, JOB, MB, MODELS, card, plan, sizes

STAYS = Wish(text_stays=True)
GUIDED = replace(JOB, forwards=2)


def text_bytes() -> int:
    return sizes().text.count * sizes().text.matrices


def test_it_stays_in_ram_where_the_gpu_has_no_room() -> None:
    kept, read = plan(12, 32, wish=STAYS), plan(12, 32)
    assert (kept.text, read.text) == ("cached", "streamed")
    assert kept.parts == read.parts and kept.blocks == read.blocks and kept.rung == read.rung
    assert {phase: kept.host[phase] - read.host[phase] for phase in read.host} == dict.fromkeys(
        ("text", "entry", "denoise", "decode"), text_bytes() + sizes().token_rows
    )
    assert kept.pinned == read.pinned + text_bytes() and read.pinned == read.ring.nbytes
    assert kept.as_dict()["predicted"]["pinned"] == kept.pinned
    assert kept.as_dict()["placement"]["text"] == "cached"
    unpinned = make_plan(sizes(), JOB, Budget(12 * GIB, 32 * GIB, 0), card(), STAYS)
    assert unpinned.text == "cached" and unpinned.pinned == 0


def test_it_comes_after_the_blocks_that_are_cached() -> None:
    """Between RAM that holds them all and RAM that holds the encoder, too, nothing is taken from them."""
    enough = plan(12, 64, wish=STAYS)
    streamed = 40 - len(enough.blocks.resident)
    for ram in (4, 6, 8, 10, 11, 12, 13, 14, 16, 32):
        made, plain = plan(12, ram, wish=STAYS), plan(12, ram)
        assert made.blocks == plain.blocks and made.ram <= ram * GIB
        if made.text == "cached":
            assert len(made.blocks.cached) == streamed
    assert plan(12, 8, wish=STAYS).text == "streamed"
    # More GPU memory may give resident blocks up for the text's keys and values: RAM for those, too.
    room = enough.ram + 3 * sizes().blocks.matrices
    assert make_plan(sizes(), JOB, Budget(12 * GIB, room, 400 * MB), card(), STAYS).text == "cached"


def test_nobody_else_has_it_in_ram() -> None:
    assert plan(40, 32, wish=STAYS).text == "resident"
    known = plan(12, 32, replace(JOB, encode_text=False), STAYS)
    assert known.text == "known" and known.ram == plan(12, 32).ram
    on_cpu = make_plan(sizes(MODELS[1], "fp32"), JOB, Budget(0, 40 * GIB, 0), card("cpu"), STAYS)
    assert on_cpu.text == "streamed"


def test_only_the_first_prompt_of_a_run_is_read_from_the_disk() -> None:
    kept, read = (plan(12, 32, GUIDED, wish) for wish in (STAYS, Wish()))
    first = sizes().text.count * sizes().text.stored
    assert read.disk_bytes - kept.disk_bytes == first
    speeds = card()
    bus = speeds.copied_to_gpu(True)
    expected = first / speeds.disk + max(text_bytes() / bus, text_bytes() / speeds.ram_copy)
    assert kept.seconds["text"].seconds == pytest.approx(expected)
    assert read.seconds["text"].seconds == pytest.approx(2 * first / speeds.disk)
    assert kept.seconds["text"].limit == read.seconds["text"].limit == "disk"
    one = plan(12, 32, wish=STAYS)
    assert one.seconds["text"] == plan(12, 32).seconds["text"] and one.disk_bytes == plan(12, 32).disk_bytes


def test_what_is_read_sooner_than_copied_in_ram_is_read() -> None:
    quick = replace(IDLE, disk=20e9, ram_copy=2e9)
    budget = Budget(4 * GIB, 64 * GIB, 400 * MB)
    assert make_plan(sizes(), GUIDED, budget, quick, STAYS).text == "streamed"
    assert make_plan(sizes(), GUIDED, budget, replace(quick, ram_copy=21e9), STAYS).text == "cached"


@pytest.mark.parametrize("phase", ["text", "denoise", "decode"])
def test_it_costs_the_gpu_nothing_and_stays_when_that_is_short(phase: str) -> None:
    made: Plan | None = plan(12, 64, wish=STAYS)
    seen = []
    while made is not None:
        seen.append(made)
        made = made.lower(phase)
    assert len(seen) > 3 and all(one.text == "cached" for one in seen)
    assert seen[-1].blocks.cached == tuple(range(40)) or phase == "decode"


def test_it_leaves_ram_to_blocks_that_lose_their_place_on_the_gpu() -> None:
    room = plan(12, 64, wish=STAYS).ram
    budget = Budget(12 * GIB, room + 3 * sizes().blocks.matrices, 400 * MB)
    made = make_plan(sizes(), JOB, budget, card(), STAYS)
    assert made.text == "cached" and made.text_kv
    lower = made.lower("denoise")
    assert lower is not None and lower.text == "cached"
    fewer = lower.lower("denoise")
    assert fewer is not None and fewer.text == "streamed"
    assert len(fewer.blocks.resident) + len(fewer.blocks.cached) == 40
    assert change(lower, fewer).endswith("the text encoder read from disk for each prompt")
    resident = plan(40, 32, wish=STAYS)
    while resident.text == "resident":
        before, below = resident, resident.lower("text")
        assert below is not None
        resident = below
    assert "the text encoder streamed" in change(before, resident)


def test_ram_short_in_the_decode_makes_the_ring_shorter_not_the_plan_impossible() -> None:
    """More that can be pinned is not to ask for a longer ring than the decode's RAM allows."""
    fitted = 0
    for ram in range(2200, 2500, 5):
        budget = Budget(7 * GIB, ram * MB, 120 * MB)
        try:
            short = make_plan(sizes(MODELS[1]), JOB, budget, card())
        except PlanError:  # too little in any case
            continue
        fitted += 1
        longer = make_plan(sizes(MODELS[1]), JOB, replace(budget, pinned=400 * MB), card())
        assert longer.ring.nbytes >= short.ring.nbytes
    assert fitted > 10


def test_ram_that_is_slower_than_the_disk_is_not_used_where_nothing_overlaps() -> None:
    """With one slot every copy counts, though computing takes longer."""
    speeds = replace(card(), disk=20e9, ram_copy=2e9)
    found = [
        make_plan(sizes(), JOB, Budget(int(2.24 * GIB), ram * GIB, 400 * MB), speeds) for ram in (3, 8, 64)
    ]
    assert all(made.blocks.slots == 1 for made in found)
    seconds = [made.seconds["denoise"].seconds for made in found]
    assert seconds == sorted(seconds, reverse=True), seconds
