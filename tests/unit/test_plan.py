"""The plan: it fits every budget, more memory never makes it slower, and each leaner plan is leaner."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.memory import costs
from runtime.memory.account import CHUNK, CHUNKS, moved
from runtime.memory.choose import BEFORE_DECODE, exceeds, with_cache
from runtime.memory.costs import usual_slice
from runtime.memory.plan import Budget, Job, Plan, Wish, assemble, make_plan, spread
from runtime.memory.sizes import ModelSizes, sizes_of_manifest
from runtime.memory.speeds import Speeds, speeds_of
from runtime.profiles import load_manifest, load_profile

GIB, MB = 2**30, 10**6
MODELS = ("wan2.1-t2v-14b-4step-fp8", "wan2.1-t2v-14b-4step-bf16", "demo-int8")
FAST = settings(max_examples=60, deadline=None)
JOB = Job(480, 832, 81)


@cache
def sizes(model: str = MODELS[0], dtype: str = "bf16") -> ModelSizes:
    return sizes_of_manifest(load_manifest(model), dtype, dtype)


@cache
def card(profile: str = "rtx4070") -> Speeds:
    return speeds_of(load_profile(profile))


def plan(vram: float, ram: float, job: Job = JOB, wish: Wish | None = None, model: str = MODELS[0]) -> Plan:
    budget = Budget(int(vram * GIB), int(ram * GIB), 400 * MB)
    return make_plan(sizes(model), job, budget, card(), wish)


USUAL = usual_slice(sizes(), JOB.video, fused=True)

IDLE = replace(card(), attention=1e18, fp8=1e18, memory=1e18)
"""A card that computes at once, so that copies show."""

jobs = st.builds(
    Job,
    height=st.just(480),
    width=st.just(832),
    frames=st.sampled_from([1, 17, 81]),
    steps=st.integers(1, 8),
    forwards=st.integers(1, 2),
    encode_text=st.booleans(),
)
cards = st.builds(
    replace,
    st.sampled_from([card("rtx4060"), card("h200"), card("rtx3090")]),
    disk=st.floats(0.1e9, 20e9),
    ram_copy=st.floats(2e9, 40e9),
)
wishes = st.builds(
    Wish,
    text_stays=st.booleans(),
    vae_stays=st.booleans(),
    attention=st.sampled_from(["", "cudnn-fp8", "sage1"]),
)
memory = st.floats(0.05, 48).map(lambda gib: int(gib * GIB))
budgets = st.builds(Budget, vram=memory, ram=memory, pinned=st.integers(0, 500 * MB))
processors = st.builds(
    Budget, vram=st.just(0), ram=st.floats(0.3, 96).map(lambda g: int(g * GIB)), pinned=st.just(0)
)
models = st.sampled_from(MODELS).map(sizes)


def tried(found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish) -> Plan | None:
    try:
        return make_plan(found, job, budget, speeds, wish)
    except PlanError:
        return None


# ------------------------------------------------------------------------------------------------- properties


@FAST
@given(models, jobs, budgets | processors, cards, wishes)
def test_a_plan_exceeds_no_budget(
    found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish
) -> None:
    made = tried(found, job, budget, speeds, wish)
    if made is None:
        return
    assert made.vram <= budget.vram and made.ram <= budget.ram
    ring = made.ring.nbytes if made.ring.pinned else 0
    assert ring <= budget.pinned and ring <= CHUNKS * CHUNK <= 400 * MB
    assert made.pinned <= made.ram and (made.pinned == ring or made.text == "cached")
    if not budget.vram:
        assert made.device == "cpu" and not made.blocks.cached
        assert all(sum(parts.values()) <= budget.ram for parts in made.parts.values())


@FAST
@given(models, jobs, budgets | processors, cards, wishes)
def test_every_block_lies_in_one_place(
    found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish
) -> None:
    made = tried(found, job, budget, speeds, wish)
    if made is None:
        return
    blocks, every = made.blocks, set(range(found.blocks.count))
    resident, cached = set(blocks.resident), set(blocks.cached)
    assert len(resident) == len(blocks.resident) and len(cached) == len(blocks.cached)
    assert not resident & cached and resident | cached <= every
    streamed = len(every) - len(resident)
    assert 0 <= blocks.slots <= streamed and (blocks.slots == 0) == (streamed == 0)
    assert made.disk_bytes >= found.blocks.count * found.blocks.stored


def larger(budget: Budget, more: tuple[int, int, int]) -> Budget:
    vram = budget.vram + more[0] if budget.vram else 0
    return Budget(vram, budget.ram + more[1], budget.pinned + more[2])


extra = st.tuples(st.just(0) | memory, st.just(0) | memory, st.just(0) | st.integers(0, 500 * MB))


@settings(max_examples=150, deadline=None)
@given(models, jobs, budgets | processors, cards, wishes, extra)
def test_more_memory_never_makes_a_plan_slower(
    found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish, more: tuple[int, int, int]
) -> None:
    before = tried(found, job, budget, speeds, wish)
    if before is None:
        return
    after = tried(found, job, larger(budget, more), speeds, wish)
    assert after is not None, "it fitted in less"
    # Frames are encoded beside the decode: of a faster one, more of the encoding is left.
    for phases in (
        *((phase,) for phase in before.seconds if phase not in ("decode", "mp4")),
        ("decode", "mp4"),
    ):
        then, now = (
            sum(one.seconds[p].seconds for p in phases if p in one.seconds) for one in (before, after)
        )
        assert now <= then * (1 + 1e-9), phases
    assert after.disk_bytes <= before.disk_bytes or after.total_seconds <= before.total_seconds


@settings(max_examples=80, deadline=None)
@given(
    models, jobs, budgets | processors, cards, wishes, st.sampled_from(["text", "entry", "denoise", "decode"])
)
def test_each_leaner_plan_is_leaner_and_there_is_an_end(
    found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish, phase: str
) -> None:
    made = tried(found, job, budget, speeds, wish)
    seen = 0
    while made is not None:
        leaner = made.lower(phase)
        if leaner is None:
            break
        before, after = ({p: sum(parts.values()) for p, parts in one.parts.items()} for one in (made, leaner))
        assert after[phase] < before[phase]
        assert all(after[other] <= before[other] for other in before)
        assert leaner.ram <= budget.ram
        if (leaner.token_slice, leaner.attention) != (made.token_slice, made.attention):
            # What may change the picture comes after all that costs time alone.
            assert phase == "denoise" and not made.blocks.resident and not made.text_kv
            assert made.text != "resident" and not made.vae_stays and leaner.blocks == made.blocks
        made, seen = leaner, seen + 1
        assert seen < 60


@given(st.integers(1, 60), st.data())
def test_blocks_are_spread_evenly(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    places = spread(range(total), count)
    assert len(set(places)) == count and list(places) == sorted(places)
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


# ---------------------------------------------------------------------------------------------------- choices


def test_a_small_card_streams_and_a_large_one_does_not() -> None:
    small, large = plan(7, 16), plan(40, 16)
    assert small.blocks.slots == 2 and 0 < len(small.blocks.resident) < 40 and small.text == "streamed"
    assert large.blocks.slots == 0 and len(large.blocks.resident) == 40 and not large.blocks.cached
    assert large.strip() == "#" * 40
    assert set(small.strip()) == {"#", "+"} and small.strip().count("#") == len(small.blocks.resident)
    assert "14" not in large.reason and "nothing streams" in large.reason


def test_what_ram_does_not_hold_is_read_from_disk() -> None:
    made = plan(4, 4)
    stored = 40 - len(made.blocks.resident) - len(made.blocks.cached)
    assert stored > 20 and made.strip().count(".") == stored
    assert "RAM holds no more" in made.reason
    # 14 GB once, and what is stored once more in each of the three later steps, but for two of ten matrices.
    matrices, of_text = sizes().blocks.stored, sizes().blocks.text_stored
    weights = 24 * sizes().text.stored + sizes().rest
    assert made.text_kv and of_text == 2 * 5120 * 5120
    assert made.disk_bytes == weights + 40 * matrices + 3 * stored * (matrices - of_text)


def test_the_token_slice_is_the_same_wherever_the_blocks_lie() -> None:
    for vram in (2.9, 4, 8, 12, 24, 80):
        for ram in (2.6, 4, 16, 64):
            assert plan(vram, ram).token_slice == USUAL
    short = plan(2.45, 16)
    assert short.token_slice is not None and short.token_slice < USUAL and not short.blocks.resident


def test_the_leanest_plans_hold_what_was_promised() -> None:
    """480p in 3.5 GB of GPU memory and 720p in 6.5, in less than 3 GB of RAM with less than 400 MB of it
    pinned.
    """
    for job, gpu in ((JOB, 3.5e9), (Job(720, 1280, 81), 6.5e9)):
        made = make_plan(sizes(), job, Budget(int(gpu), int(3e9), 400 * MB), card())
        assert made.vram <= gpu and made.ram <= 3e9 and made.pinned <= 400e6
        assert made.blocks.slots == 2 and made.token_slice == usual_slice(sizes(), job.video, fused=True)


def test_wishes_come_true_only_when_all_fits_together() -> None:
    wish = Wish(text_stays=True, vae_stays=True)
    for vram in (6, 12, 15):
        made = plan(vram, 32, wish=wish)
        assert made.text == "cached" and not made.vae_stays and made.blocks.slots
    middle, large = plan(20, 32, wish=wish), plan(40, 32, wish=wish)
    assert (middle.text, middle.vae_stays) == ("cached", True)
    assert (large.text, large.vae_stays, large.release_for_decode) == ("resident", True, False)
    assert plan(40, 32).text == "streamed" and not plan(40, 32).vae_stays
    assert large.peaks["denoise"] > plan(40, 32).peaks["denoise"] + 4e9


def test_known_text_states_need_no_encoder() -> None:
    made = plan(8, 16, job=replace(JOB, encode_text=False), wish=Wish(text_stays=True))
    assert made.text == "known" and "text" not in made.peaks and "text" not in made.seconds
    assert made.disk_bytes == plan(8, 16).disk_bytes - 24 * sizes().text.stored


# ------------------------------------------------------------------------------------------ attention, slices


def test_attention_in_8_bits_where_there_is_room_for_its_copies() -> None:
    wish = Wish(attention="cudnn-fp8")
    rich, poor = plan(12, 32, wish=wish), plan(2.3, 16, wish=wish)
    assert rich.attention == "cudnn-fp8" and poor.attention == ""
    assert rich.seconds["denoise"].seconds < plan(12, 32).seconds["denoise"].seconds
    assert rich.parts["denoise"]["activations"] > plan(12, 32).parts["denoise"]["activations"]
    leaner: Plan | None = rich
    taken = []
    while leaner is not None and leaner.attention:
        taken.append(sum(leaner.parts["denoise"].values()))
        before, leaner = leaner, leaner.lower("denoise")
        assert leaner is not None  # one slot comes after it
    assert leaner is not None and not before.blocks.resident and leaner.blocks == before.blocks
    assert sum(leaner.parts["denoise"].values()) < taken[-1] and len(taken) > 5


def test_an_attention_that_takes_less_than_16_bits_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(costs.STATES_8BIT, "cudnn-fp8", 4.5)
    made: Plan | None = plan(12, 32, wish=Wish(attention="cudnn-fp8"))
    seen = []
    while made is not None:
        seen.append((made.attention, made.token_slice, len(made.blocks.resident), made.blocks.slots))
        made = made.lower("denoise")
    assert {attention for attention, *_ in seen} == {"cudnn-fp8"} and seen[-1][-1] == 1
    assert len({slice_ for _, slice_, *_ in seen}) > 2  # there shorter slices do take less


@FAST
@given(models, jobs, st.sampled_from(["", "cudnn-fp8", "sage2", "sage1"]), st.booleans())
def test_the_usual_slice_is_as_long_as_costs_nothing(
    found: ModelSizes, job: Job, attention: str, fused: bool
) -> None:
    usual = usual_slice(found, job.video, fused, attention)
    tokens = job.video.tokens
    assert usual >= 4096 and usual % 256 == 0
    if usual > 4096:
        sliced, shorter = (
            costs.activations(found, job.video, n, fused=fused, attention=attention) for n in (usual, 512)
        )
        assert sliced == shorter
    pieces = -(-tokens // usual)
    assert ((pieces - 1) * usual < tokens and usual - tokens / pieces < 256) or usual == 4096


# ------------------------------------------------------------------------------- keys and values of the text


@FAST
@given(models, jobs, budgets | processors, cards, wishes)
def test_keeping_the_text_is_neither_slower_nor_more_to_move(
    found: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish
) -> None:
    """Against the best plan of each way, made apart."""
    made = tried(found, job, budget, speeds, wish)
    if made is None or not made.blocks.slots:
        return
    inputs = made.inputs
    usual = usual_slice(found, job.video, inputs.fused, made.attention)
    plain = replace(made._choice(), text_kv=False, resident=0, cached=0, slots=min(2, found.blocks.count))
    for start in (plain, replace(plain, text_kv=True)):
        if exceeds(inputs, start, BEFORE_DECODE) is None and start.token_slice in (None, usual):
            fitting = range(found.blocks.count - start.slots + 1)
            ways = [replace(start, resident=n) for n in fitting]
            most = max(way.resident for way in ways if exceeds(inputs, way, BEFORE_DECODE) is None)
            other = assemble(inputs, with_cache(inputs, replace(start, resident=most)))
            mine, theirs = made.seconds["denoise"].seconds, other.seconds["denoise"].seconds
            if budget.vram or made.blocks.resident:  # on the CPU a short ring goes without
                assert mine <= theirs * (1 + 1e-9)
            if made.blocks.resident and mine >= theirs * (1 - 1e-9):
                bytes_ = [(one.disk_bytes, moved(inputs, one._choice())) for one in (made, other)]
                assert bytes_[0] <= bytes_[1]


def test_the_text_is_kept_where_many_blocks_stream_or_room_is_left() -> None:
    """419 MB at 14B: two of ten matrices of each block that streams, or one block more in fp8."""
    least = {n: plan(n / 100, 64) for n in range(250, 2000, 5)}
    all_here = [n for n, made in least.items() if not made.blocks.slots]
    assert not plan(2.45, 16).text_kv  # short slices: nothing is left
    assert not least[all_here[0]].text_kv and least[all_here[0] + 50].text_kv
    for made in least.values():
        streamed = 40 - len(made.blocks.resident)
        if streamed > 11 and len(made.blocks.resident) > 1:
            assert made.text_kv, made.strip()
        if 3 <= streamed <= 5:  # while two stream no other can stay, and what is left over is for the text
            assert not made.text_kv, made.strip()
    part = least[800].parts["denoise"]["text keys and values"]
    assert part == 40 * 2 * 512 * 5120 * 2
    assert all("text keys and values" not in parts for p, parts in least[800].parts.items() if p != "denoise")
    assert not plan(8, 64, replace(JOB, steps=1)).text_kv  # no step would use them
    guided = plan(8, 64, replace(JOB, forwards=2))
    assert guided.text_kv and guided.parts["denoise"]["text keys and values"] == 2 * part
    assert least[800].as_dict()["placement"]["text_kv"] is True


def test_what_is_kept_does_not_move_again() -> None:
    """Where copies set the time: four steps copy four times eight of ten matrices, and once the other two."""
    budget = Budget(4 * GIB, 64 * GIB, 400 * MB)
    made = make_plan(sizes(), JOB, budget, replace(IDLE, pcie=1e9, disk=1e12, ram_copy=1e12))
    blocks = sizes().blocks
    streamed = 40 - len(made.blocks.resident)
    lean = blocks.matrices - blocks.text_matrices
    assert made.text_kv and made.seconds["denoise"].limit == "PCIe" and lean == 351272960 - 2 * 5120**2
    expected = (40 * blocks.matrices + 3 * streamed * lean) / 1e9
    assert made.seconds["denoise"].seconds == pytest.approx(expected)
    guided = make_plan(sizes(), replace(JOB, forwards=2), budget, made.inputs.speeds)
    streamed = 40 - len(guided.blocks.resident)
    expected = ((40 + streamed) * blocks.matrices + 6 * streamed * lean) / 1e9
    assert guided.text_kv and guided.seconds["denoise"].seconds == pytest.approx(expected)


def test_guidance_streams_everything_twice() -> None:
    one, two = plan(4, 4), plan(4, 4, job=replace(JOB, forwards=2))
    assert two.seconds["denoise"].seconds == pytest.approx(2 * one.seconds["denoise"].seconds, rel=0.1)
    assert two.disk_bytes > 1.8 * one.disk_bytes


def test_the_blocks_leave_for_the_decode_only_where_they_must() -> None:
    assert plan(8, 16).release_for_decode and plan(8, 16).rung.name == "whole"
    assert not plan(24, 16).release_for_decode
    tiled = plan(2.9, 16)
    assert (
        tiled.rung.name != "whole" and tiled.seconds["decode"].seconds > plan(8, 16).seconds["decode"].seconds
    )


def test_the_ring_is_as_long_as_can_be_pinned() -> None:
    rings = {}
    for pinned in (400 * MB, 250 * MB, 110 * MB, 50 * MB, 0):
        made = make_plan(sizes(), JOB, Budget(8 * GIB, 16 * GIB, pinned), card())
        rings[pinned] = (made.ring.chunks, made.ring.pinned)
        assert made.pinned <= pinned
    assert rings == {
        400 * MB: (11, True),
        250 * MB: (6, True),
        110 * MB: (3, True),
        50 * MB: (6, False),
        0: (6, False),
    }
    slow = replace(IDLE, pcie=5e9, disk=1e12)
    times = [
        make_plan(sizes(), JOB, Budget(4 * GIB, 32 * GIB, pinned), slow).seconds["denoise"]
        for pinned in (400 * MB, 0)
    ]
    assert times[1].seconds > 2 * times[0].seconds and times[1].limit == "PCIe"


def test_what_limits_a_phase_is_the_longest_term() -> None:
    assert plan(8, 32).seconds["denoise"].limit == "compute"
    slow = replace(card("h200"), disk=0.2e9)
    made = make_plan(sizes(), JOB, Budget(4 * GIB, 4 * GIB, 400 * MB), slow)
    stored = 40 - len(made.blocks.resident) - len(made.blocks.cached)
    assert made.seconds["denoise"].limit == "disk"
    blocks = sizes().blocks
    assert made.text_kv
    expected = (40 * blocks.stored + 3 * stored * (blocks.stored - blocks.text_stored)) / 0.2e9
    assert made.seconds["denoise"].seconds == pytest.approx(expected)
    assert made.seconds["text"].limit == "disk"


def test_a_disk_that_is_faster_than_copying_in_ram_is_read() -> None:
    quick = replace(IDLE, disk=20e9, ram_copy=2e9)
    made = make_plan(sizes(), JOB, Budget(4 * GIB, 64 * GIB, 400 * MB), quick)
    assert 1 <= len(made.blocks.cached) < 10
    hidden = make_plan(sizes(), JOB, Budget(4 * GIB, 64 * GIB, 400 * MB), replace(quick, attention=1e12))
    assert len(hidden.blocks.resident) + len(hidden.blocks.cached) == 40  # no slower, and the disk can rest


def test_the_processor_keeps_what_it_can() -> None:
    def on_cpu(ram: float, model: str = MODELS[1], job: Job = JOB) -> Plan:
        return make_plan(sizes(model, "fp32"), job, Budget(0, int(ram * GIB), 0), card("cpu"))

    lean, large, demo = on_cpu(30), on_cpu(120), on_cpu(4, "demo", Job(96, 160, 17))
    assert lean.device == "cpu" and 0 < len(lean.blocks.resident) < 40 and lean.blocks.slots == 2
    assert lean.text == "streamed" and large.text == "resident" and large.blocks.slots == 0
    assert demo.strip() == "######" and demo.ram < 1e9 and demo.pinned == 0
    assert all(peak == 0 for peak in large.peaks.values())
    assert large.parts["text"]["text encoder"] > 256384 * 4096 * 4  # the whole model, its table of tokens too


def test_one_slot_is_the_last_resort() -> None:
    made = plan(2.24, 16)
    assert made.blocks.slots == 1 and not made.blocks.resident
    two = make_plan(sizes(), JOB, Budget(int(2.9 * GIB), 16 * GIB, 400 * MB), card())
    assert made.seconds["denoise"].seconds > two.seconds["denoise"].seconds  # nothing overlaps


# ----------------------------------------------------------------------------------------------------- leaner


def test_the_ladder_of_a_denoise() -> None:
    made: Plan | None = plan(30, 16, wish=Wish(text_stays=True, vae_stays=True))
    steps, kept = [], []
    while made is not None:
        steps.append(
            (made.token_slice, made.text, made.vae_stays, len(made.blocks.resident), made.blocks.slots)
        )
        kept.append(made.text_kv)
        made = made.lower("denoise")
    assert kept[:2] == [True, False] and not any(kept[1:])  # the least change
    assert steps[0] == steps[1] == (USUAL, "resident", True, 40, 0)
    assert steps[2][:3] == (USUAL, "streamed", True)  # shorter slices take no less here: 5U is the peak
    assert [step[3] for step in steps if step[1] == "streamed" and not step[2]] == [40, 20, 10, 5, 2, 1, 0, 0]
    assert steps[-1][-1] == 1


def test_the_ladder_of_a_decode() -> None:
    made: Plan | None = plan(30, 16, wish=Wish(text_stays=True, vae_stays=True))
    rungs, released = [], []
    while made is not None:
        rungs.append(made.rung.name)
        released.append(made.release_for_decode)
        peak = made.peaks["decode"]
        made = made.lower("decode")
    assert rungs[:2] == ["whole", "whole"] and released[:2] == [False, True]
    # The embeddings of a transformer that was wholly resident stay: 0.8 GB.
    assert len(set(rungs)) >= 5 and peak < 1.3e9 + sizes().entry


def test_fewer_resident_blocks_are_cached_where_ram_has_room() -> None:
    made = plan(12, 32)
    lower = made
    while len(lower.blocks.resident) == len(made.blocks.resident):
        following = lower.lower("denoise")
        assert following is not None
        lower = following
    assert len(lower.blocks.resident) + len(lower.blocks.cached) == 40


# --------------------------------------------------------------------------------------------------- refusals


def refusal(vram: float, ram: float, job: Job = JOB, wish: Wish | None = None, model: str = MODELS[0]) -> str:
    with pytest.raises(PlanError) as caught:
        plan(vram, ram, job, wish, model)
    message = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in message and message.endswith(".")
    return message


def test_too_little_gpu_memory_is_told_with_what_would_do() -> None:
    message = refusal(1.5, 16)
    assert "480x832x81" in message and "GPU memory to denoise" in message and "there are 2.00 GiB" in message
    frames = int(message.split("--frames ")[1].split(",")[0])
    assert plan(1.5, 16, replace(JOB, frames=frames)) and frames % 4 == 1
    assert "GPU memory" in refusal(1.5, 16, replace(JOB, frames=frames + 4))
    height, width = (
        int(message.split(f"--{name} ")[1].split(" ")[0].strip(",")) for name in ("height", "width")
    )
    assert plan(1.5, 16, replace(JOB, height=height, width=width))
    needed = float(message.split("or ")[-1].split(" GiB")[0])
    assert plan(needed - costs.CUDA_CONTEXT / GIB, 16)


def test_a_smaller_variant_is_advised_where_it_fits() -> None:
    others = {"the-fp8-one": sizes()}
    message = refusal(2.4, 16, wish=Wish(alternatives=others), model=MODELS[1])
    assert "--model the-fp8-one" in message
    assert "--model" not in refusal(0.2, 16, wish=Wish(alternatives=others), model=MODELS[1])


def test_too_little_ram_is_told_and_both_together() -> None:
    assert "RAM" in refusal(8, 1.2) and "GPU memory" not in refusal(8, 1.2)
    both = refusal(0.5, 0.5)
    assert "GPU memory" in both and "of RAM" in both and " and " in both


def test_tall_videos_are_advised_tall_sizes() -> None:
    message = refusal(1.5, 16, Job(1280, 720, 81))
    height, width = (
        int(message.split(f"--{name} ")[1].split(" ")[0].strip(",")) for name in ("height", "width")
    )
    assert height > width
