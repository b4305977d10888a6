"""The arithmetic of the bench: samples, counts, goals, what kernels belong to, the card, the page."""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo import eight_bits
from entrypoint.bench_page import Gauged, Report, goal_of, value_of
from entrypoint.bench_runs import summed
from runtime.bench import alone, clock, forward, text
from runtime.bench.busy import Kernel, busy
from runtime.bench.following import following, plain
from runtime.bench.gauge import Gauge, Reading, summarize
from runtime.bench.samples import Row, Sample, of_sum
from runtime.bench.scene import Scene, Where, condition_of, warm_forward
from runtime.bench.sizes import Mix, Product, Size, Work, operations, read_sizes, words
from runtime.bench.targets import FULL, LARGE_SIZE, SMALL_SIZE, TARGETS, Verdict, judge
from runtime.errors import OutputCheckError, OutputError, RequestError
from runtime.fitting import Fitting
from runtime.layers.backends import BACKENDS, Backend, available, sdpa
from runtime.linear import swap_linears
from runtime.profiles import find_model, load_manifest, load_profile
from runtime.transformer import Block, Transformer
from runtime.ways import Ways
from tests import tiny

CPU = torch.device("cpu")


# --- samples ---


def test_a_sample_shows_its_median_least_and_most() -> None:
    drawn = random.Random(3)
    values = tuple(drawn.uniform(1, 9) for _ in range(5))
    shuffled = Sample(tuple(drawn.sample(values, 5)))
    low, _, middle, _, high = sorted(values)
    assert (shuffled.least, shuffled.median, shuffled.most) == (low, middle, high)
    assert shuffled.map(lambda value: 2 * value).median == 2 * middle
    assert shuffled.as_dict()["values"] == list(shuffled.values)
    with pytest.raises(ValueError, match="no values"):
        Sample(())


def test_operations_add_up_round_by_round() -> None:
    samples = {"a": Sample((1.0, 4.0, 2.0)), "b": Sample((10.0, 10.0, 30.0))}
    assert of_sum(samples, {"a": 3, "b": 2}).values == (23.0, 32.0, 66.0)


def test_a_ratio_is_of_medians_and_needs_a_reference() -> None:
    row = Row("forward", "one forward", "s", Sample((2.0, 8.0, 4.0)))
    assert row.ratio is None and "ratio" not in row.as_dict()
    beside = replace(row, reference=Sample((6.0,)))
    assert beside.ratio == 1.5 and beside.as_dict()["reference"]["median"] == 6.0


def test_runs_are_interleaved_after_a_warm_up() -> None:
    order: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: (lambda name=name: order.append(name)) for name in "ab"}
    ticks = iter(range(100))

    def tick(run: Callable[[], object], device: torch.device) -> float:
        run()
        return float(next(ticks))

    found = clock.interleaved(runs, 3, CPU, tick)
    assert "".join(order) == "ab" + "ababab"
    assert found["a"].values == (2.0, 4.0, 6.0) and found["b"].values == (3.0, 5.0, 7.0)


def test_short_operations_are_timed_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is 2 ms busy with each run, and a host that takes 3 ms more for one alone."""
    runs: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(runs)

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return 2.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    alone = {"short": 0.005, "long": 0.2}
    for name, seconds in alone.items():
        monkeypatch.setattr(clock, "on_device", lambda run, device, s=seconds: (run(), s)[1])
        runs.clear()
        found = clock.queued(lambda: runs.append(1), torch.device("cuda"))
        assert found == pytest.approx(0.002 if name == "short" else 0.2)
        assert len(runs) == (2 + clock.IN_A_ROW if name == "short" else 1)
    monkeypatch.undo()
    runs.clear()
    assert clock.queued(lambda: runs.append(1), CPU) > 0 and len(runs) == 1


def test_the_card_is_watched_where_it_is_measured() -> None:
    told = iter(range(100, 200, 10))

    @contextmanager
    def watch() -> Iterator[list[Reading]]:
        readings: list[Reading] = []
        yield readings
        readings.append(Reading(next(told), 1, 1.0, 1, 0))

    scene = Scene(scene_on_a_card().where, 1, watch=watch)
    assert scene.take_readings() == []
    for _ in range(2):
        with scene.measuring():
            pass
    assert [reading.sm for reading in scene.take_readings()] == [100, 110]
    assert scene.take_readings() == []


def test_both_clocks_measure_the_cpu() -> None:
    for one in (clock.wall, clock.on_device):
        assert 0.02 <= one(lambda: time.sleep(0.02), CPU) < 5


# --- sizes and counts ---


def test_sizes_are_read_with_commas_or_spaces() -> None:
    assert read_sizes("480x832x81, 720x1280x81 480x832x81") == (Size(480, 832, 81), Size(720, 1280, 81))
    assert str(Size(480, 832, 81)) == SMALL_SIZE and words(" a,,b a") == ["a", "b"]
    request = Size(32, 48, 5).request("A fox", seed=9)
    assert (request.height, request.width, request.frames, request.seed) == (32, 48, 5, 9)


@pytest.mark.parametrize("wrong", ["", " ,", "480x832", "480*832*81", "480x832x81x2", "x"])
def test_a_size_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(RequestError, match="HEIGHTxWIDTHxFRAMES"):
        read_sizes(wrong)


def test_the_full_model_has_the_work_that_its_sizes_say() -> None:
    tokens, dim, ffn, layers = 32_760, 5120, 13_824, 40
    square, up, down = (Product(tokens, *one) for one in ((dim, dim), (ffn, dim), (dim, ffn)))
    work = Work(
        Counter({Mix(tokens, tokens, 40, 128): layers}),
        Counter({Mix(tokens, 512, 40, 128): layers}),
        Counter({square: 6 * layers, up: layers, down: layers}),
    )
    assert operations(work.of_tokens.items()) == layers * 4 * tokens**2 * dim
    assert operations(work.products.items()) == layers * 2 * tokens * (6 * dim**2 + 2 * dim * ffn)
    assert work.largest == up
    assert work.words() == "40 self attentions, 40 cross attentions, 320 products"


# --- recording ---


def transformer(form: str | None) -> Transformer:
    torch.manual_seed(11)
    model = Transformer(tiny.TRANSFORMER).eval().requires_grad_(False)
    if form is not None:
        modules = dict(model.named_modules())
        names = [name for name, one in modules.items() if isinstance(one, torch.nn.Linear)]
        inside = dict.fromkeys((name for name in names if name.startswith("blocks.")), form)
        swap_linears(model, inside)
        for name in inside:
            empty = model.get_submodule(name)
            made = alone.random_linear(empty.out_features, empty.in_features, empty, torch.float32, CPU)
            empty.load_state_dict(made.state_dict())
    return model


@pytest.mark.parametrize("form", [None, "fp8", "int8"])
@pytest.mark.parametrize("token_slice", [None, 5])
def test_what_a_forward_asks_for_is_recorded_and_made_again(
    form: str | None, token_slice: int | None
) -> None:
    model = transformer(form)
    model.token_slice = token_slice
    config = tiny.TRANSFORMER
    latents = torch.randn(1, 16, 2, 4, 6)  # 12 tokens
    states = torch.randn(1, config.text_len, config.text_dim)
    with torch.inference_mode():
        (condition,) = model.conditions(torch.tensor([[500.0]]), states)
        expected = model.velocity(latents, condition)
        with alone.recording(model) as work:
            recorded = model.velocity(latents, condition)
        again = model.velocity(latents, condition)
    assert torch.equal(expected, recorded) and torch.equal(expected, again)
    dim, layers = config.dim, config.num_layers
    assert work.of_tokens == {Mix(12, 12, config.num_heads, config.head_dim): layers}
    pieces = {12: 1} if token_slice is None else {5: 2, 2: 1}
    heads = (config.num_heads, config.head_dim)
    assert work.on_text == {Mix(rows, config.text_len, *heads): n * layers for rows, n in pieces.items()}
    rows = Counter({})
    for product, times in work.products.items():
        rows[product.rows] += times
    tokens = {length: 8 * layers * times for length, times in pieces.items()}
    assert {length: rows[length] for length in pieces} == tokens
    assert set(rows) - set(pieces) <= {config.text_len}  # its keys and values, where they are not kept
    assert work.largest.columns * work.largest.depth == dim * config.ffn_dim
    block = next(model.blocks.children())
    like = alone.linears(block)[0]
    for product in work.products:
        y = alone.product(product, like, torch.float32, CPU)()
        assert isinstance(y, torch.Tensor) and y.shape == (product.rows, product.columns)
        assert 0.5 < float(y.std()) < 2  # neither zeros nor overflow
    for mix in (*work.of_tokens, *work.on_text):
        out = alone.mix(mix, "sdpa", torch.float32, CPU)()
        assert isinstance(out, torch.Tensor) and out.shape == (1, mix.tokens, mix.heads, mix.width)
        assert 0.04 < float(out.std()) < 1


def test_compact_attention_is_made_again_in_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = replace(BACKENDS["sdpa"], compact=eight_bits.hopper_compact)
    monkeypatch.setitem(BACKENDS, "sdpa", taken)
    one = Mix(130, 130, 2, 128)
    run = alone.mix(one, "sdpa", torch.bfloat16, CPU)
    out = run()
    assert isinstance(out, torch.Tensor) and torch.equal(out, run())  # its inputs stay as they are
    monkeypatch.undo()
    plain = alone.mix(one, "sdpa", torch.bfloat16, CPU)()
    assert isinstance(plain, torch.Tensor)
    off = float((out - plain).float().norm() / plain.float().norm())
    print(f"compact attention of random rows: {off:.4f} from torch's")
    assert 0.001 < off < 0.06


@pytest.mark.parametrize("guarded", [True, False])
def test_a_way_is_followed_and_left_again(guarded: bool) -> None:
    model = transformer(None)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    before = [(block.self_attn.mix, block.cross_attn.mix) for block in blocks]
    ways = Ways(CPU, ["sdpa-math"], "sdpa-math", fused=True)
    states = torch.randn(1, tiny.TRANSFORMER.text_len, tiny.TRANSFORMER.text_dim)
    with torch.inference_mode():
        (condition,) = model.conditions(torch.tensor([[500.0]]), states)
        with following(model, ways, guarded=guarded):
            model.velocity(torch.randn(1, 16, 2, 4, 6), condition)
    assert (len(ways.sampled.numbers()) > 0) == guarded
    assert [(block.self_attn.mix, block.cross_attn.mix) for block in blocks] == before
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert plain(CPU).as_dict() == {"attention": "sdpa", "text_attention": "sdpa", "kernels": "plain"}


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A backend in 8 bits, `eight`, and the lengths that it computed."""
    lengths: list[int] = []

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        lengths.append(q.shape[1])
        return sdpa(q, k, v, scale)

    monkeypatch.setitem(BACKENDS, "eight", Backend("eight", 8, lambda _: run, lowest=(0, 0)))
    available.cache_clear()
    yield lengths
    available.cache_clear()


def scene_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rooms: Iterator[str]) -> Scene:
    """On the CPU, with plans that are taken for those of a GPU, and `rooms` for their attention."""
    prepare = Fitting.prepare

    def prepared(self: Fitting, *given: Any) -> None:
        prepare(self, *given)
        assert self.plan is not None
        self.plan = replace(self.plan, device="cuda", attention=next(rooms))

    monkeypatch.setattr(Fitting, "prepare", prepared)
    profile = load_profile("cpu")
    manifest, directory = find_model(checkpoint, profile, None)
    return Scene(Where(manifest, directory, profile, "cpu", "cpu"), repeats=1, attention="eight")


@pytest.mark.parametrize("rooms", [("eight", "eight"), ("eight", ""), ("", "")])
def test_attention_is_what_the_plan_has_room_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, eight: list[int], rooms: tuple[str, str]
) -> None:
    """As in a run: when the pipeline loads, and when it is placed for another size."""
    with scene_of(tiny_checkpoint, monkeypatch, iter(rooms)) as scene:
        sizes = (Size(32, 48, 5), Size(32, 64, 5))
        assert [scene.pipe(size).ways.name for size in sizes] == [room or "sdpa" for room in rooms]


def test_after_a_shortage_of_memory_too(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, eight: list[int]
) -> None:
    """A leaner plan that has no room for 8 bits: the warm-up goes on without them."""
    with scene_of(tiny_checkpoint, monkeypatch, iter(["eight"])) as scene:
        pipe = scene.pipe(Size(32, 48, 5))
        latents, condition = scene.latents(Size(32, 48, 5)), condition_of(pipe, CPU, torch.float32)
        eight.clear()
        short = [torch.OutOfMemoryError("CUDA out of memory.")]

        def leaner(phase: str, reason: str) -> None:
            assert pipe.fitting.plan is not None
            pipe.fitting.plan = replace(pipe.fitting.plan, attention="")

        def velocity(*given: Any) -> Tensor:
            made = Transformer.velocity(pipe.parts.transformer, *given)
            if short:
                raise short.pop()
            return made

        monkeypatch.setattr(pipe.fitting, "step_down", leaner)
        monkeypatch.setattr(pipe.parts.transformer, "velocity", velocity)
        warm_forward(pipe, latents, condition)
        assert pipe.ways.name == "sdpa"
        assert len(eight) == tiny.TRANSFORMER.num_layers  # those of the forward that failed


# --- goals ---


def row_for(target: str, seconds: float, **changes: object) -> Row:
    row = Row("p", "w", "s", Sample((seconds,)), target=target, family=FULL, format="fp8", size=SMALL_SIZE)
    return replace(row, **changes)  # type: ignore[arg-type]


def test_goals_are_for_the_card_they_were_set_for() -> None:
    h200 = "NVIDIA H200"
    assert judge(row_for("forward", 1.85), h200) == Verdict(1.85, True)
    assert judge(row_for("forward", 1.86), h200) == Verdict(1.85, False)
    assert judge(row_for("forward", 1.0), "NVIDIA GeForce RTX 4090") == Verdict(None, None)
    assert judge(row_for("forward", 7.4, size=LARGE_SIZE), h200) == Verdict(7.5, True)
    for other in ({"format": "bf16"}, {"family": "demo"}, {"size": "96x160x17"}, {"found": None}):
        assert judge(row_for("forward", 1.0, **other), h200) is None, other
    assert judge(row_for("", 1.0), h200) is None
    assert judge(row_for("text", 0.02, size="", format="bf16"), h200) == Verdict(0.03, True)


def test_no_row_has_two_goals_on_one_card() -> None:
    keys = [
        (one.card, one.family, one.row, one.size, form) for one in TARGETS for form in one.formats or ("any",)
    ]
    assert len(keys) == len(set(keys)) and all(one.most > 0 for one in TARGETS)


def test_what_is_said_of_a_goal() -> None:
    slow = row_for("forward", 2.442)
    assert goal_of(slow, judge(slow, "NVIDIA H200")) == "<= 1.850 s missed, 32% above"
    assert goal_of(slow, judge(slow, "NVIDIA H100")) == "no target for this card"
    assert goal_of(row_for("forward", 1.7), Verdict(1.85, True)) == "<= 1.850 s reached"
    assert goal_of(replace(slow, right=False), None) == "FAILED"
    assert goal_of(row_for("", 1.0), None) == ""


# --- what the GPU was busy with ---

CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31"
GEMM = "nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT"


def kernels_of_a_block(start: float, slices: int) -> list[Kernel]:
    """A block's kernels in order: products, the 8-bit passes and the attention, then slices of the rest."""
    names = [
        "_norm_kernel",
        GEMM,
        GEMM,
        GEMM,
        "_spread_kernel",
        GEMM,  # rotates the mean of the keys
        "reduce_kernel",
        "_to_eight_bits_kernel",
        CUDNN,
    ]
    for _ in range(slices):
        names += [GEMM, "_norm_kernel", GEMM, CUDNN, GEMM, "void cutlass::Kernel2<gemm>", "_gated_add_kernel"]
    return [Kernel(name, start + place, 2.0 if name == CUDNN else 1.0) for place, name in enumerate(names)]


@pytest.mark.parametrize("slices", [1, 8])
def test_kernels_are_told_apart(slices: int) -> None:
    kernels = [kernel for block in range(5) for kernel in kernels_of_a_block(1000.0 * block, slices)]
    random.Random(1).shuffle(kernels)
    found = busy(kernels, blocks=5)
    assert found.of_tokens == 5 * 4 and found.on_text == 5 * 2 * slices
    assert found.attention == found.of_tokens + found.on_text
    assert found.products == 5 * (4 + 4 * slices)
    assert found.other == 5 * (2 + 2 * slices)
    assert found.kernels == len(kernels) and sum(runs for _, runs, _ in found.top) == len(kernels)


def test_attention_that_cannot_be_told_apart_stays_one_number() -> None:
    kernels = [*kernels_of_a_block(0, 2), Kernel(GEMM, 90, 1), Kernel(CUDNN, 91, 1)]
    found = busy(kernels, blocks=3)
    assert found.of_tokens is None and found.on_text is None and found.attention == 9
    assert busy([], blocks=2).kernels == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void qk_int_sv_f8_attn_kernel<128u, 64u>", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void QuantInt8Kernel<128u, 64u, true>", "attention"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128", "products"),
        ("_descriptors_kernel", "products"),
        ("_row_quantize_kernel", "other"),
        ("_norm_kernel", "other"),
        ("_rms_rope_kernel", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_names_of_kernels(name: str, kind: str) -> None:
    assert Kernel(name, 0, 1).kind == kind


# --- the card ---


def test_readings_become_medians_and_leasts() -> None:
    readings = [
        Reading(1980, 3201, 690.0, 60, 0),
        Reading(1500, 3201, 700.0, 64, 0x4),
        Reading(1600, 3201, 698.0, 62, 0x5),
    ]
    found = summarize(readings)
    assert found is not None
    assert found.sm == (1600, 1500) and found.watts == (698, 690) and found.hottest == 64
    assert found.reasons == {"power cap": 0.667}  # idle is no reason to worry
    assert summarize([]) is None


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **changes: object) -> SimpleNamespace:
    calls: list[str] = []
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, which: {1: 1755, 2: 3201}[which],
        nvmlDeviceGetPowerUsage=lambda handle: 654_321,
        nvmlDeviceGetTemperature=lambda handle, which: 51,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4,
        calls=calls,
    )
    nvml.__dict__.update(changes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_the_card_is_watched_while_a_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def power(handle: object) -> int:
        asked.append(handle)
        return 654_321

    nvml = fake_nvml(monkeypatch, nvmlDeviceGetPowerUsage=power)
    with Gauge("GPU-1", interval=0.01) as gauge:
        with gauge.during() as first:
            until(lambda: len(asked) > 5)
        with gauge.during() as second:
            pass
    assert gauge.trouble == "" and nvml.calls == ["init", "shutdown"] and set(asked) == {b"GPU-1"}
    assert first[0] == Reading(1755, 3201, 654.321, 51, 0x4)
    assert len(first) >= 5 and len(second) >= 2


def until(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what another thread does; a busy machine may take its time."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.005)


def test_a_card_that_does_not_answer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: object) -> int:
        raise PermissionError("Insufficient Permissions")

    fake_nvml(monkeypatch, nvmlDeviceGetPowerUsage=refuse)
    with Gauge("GPU-1", interval=0.01) as gauge, gauge.during() as readings:
        time.sleep(0.03)
    assert readings == [] and "Insufficient Permissions" in gauge.trouble
    with Gauge(None) as nothing, nothing.during() as readings:
        pass
    assert readings == [] and nothing.trouble == "no card"


def test_a_card_that_stops_answering_keeps_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([51] * 4)

    def temperature(handle: object, which: int) -> int:
        return next(left)

    fake_nvml(monkeypatch, nvmlDeviceGetTemperature=temperature)
    with Gauge("GPU-1", interval=0.005) as gauge, gauge.during() as readings:
        until(lambda: gauge.trouble != "")
    assert len(readings) == 3 and "StopIteration" in gauge.trouble  # the fourth was the trial at the start


# --- what only a GPU has, with the GPU's part made up ---


def scene_on_a_card() -> Scene:
    manifest, profile = load_manifest(f"{FULL}-fp8"), load_profile("h200")
    return Scene(Where(manifest, Path("nowhere"), profile, "h200", "cuda:0"), repeats=3)


def test_a_profile_becomes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel for block in range(40) for kernel in kernels_of_a_block(1000.0 * block, 8)]
    monkeypatch.setattr(forward, "kernels_of", lambda run, device: kernels)
    scene = scene_on_a_card()
    made = SimpleNamespace(scene=scene, size=Size(480, 832, 81), run=None, way=plain(CPU), blocks=40)
    made.run = lambda way, guarded: None
    rows = {row.what: row for row in forward._profiled(made)}  # type: ignore[arg-type]
    seconds = {what.removeprefix("profiled: "): row.found for what, row in rows.items()}
    assert {what: one.median for what, one in seconds.items() if one is not None} == {
        "self attention": 160,
        "cross attention": 640,
        "products": 40 * 36,
        "everything else": 40 * 18,
    }
    rest = rows["profiled: everything else"]
    assert judge(rest, "NVIDIA H200") == Verdict(0.13, False) and "_norm_kernel" in rest.note
    monkeypatch.setattr(forward, "kernels_of", lambda run, device: kernels[:-9])
    assert "profiled: attention" in {row.what for row in forward._profiled(made)}  # type: ignore[arg-type]
    plainly = list(forward._profiled(made, plain(CPU)))  # type: ignore[arg-type]
    assert all(row.what.startswith("reference, profiled: ") for row in plainly) and len(plainly) == 3
    assert not any(row.target for row in plainly)  # goals are of the way in use


def test_streamed_text_is_compared_with_its_bytes_over_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_on_a_card()
    pipe = SimpleNamespace(ways=Ways("cpu", fused=True))
    monkeypatch.setattr(scene, "pipe", lambda size: pipe)
    monkeypatch.setattr(text, "_ids", lambda *given: torch.ones(1, 512, dtype=torch.int64))
    monkeypatch.setattr(text, "_resident", lambda *given: nullcontext())
    monkeypatch.setattr(text, "give_back", lambda device: None)
    found = {"in use": Sample((0.02,)), "reference": Sample((0.03,))}
    monkeypatch.setattr(text, "interleaved", lambda runs, *rest: {name: found[name] for name in runs})
    streamed = text.Streamed(5_500_000_000, Sample((0.2,)), Sample((0.11, 0.12, 0.1)), 5_500_000_000, "")
    monkeypatch.setattr(text, "_streamed", lambda *given: streamed)
    monkeypatch.setattr(text, "_bus", lambda scene: Sample((55e9,)))
    rows = {row.what: row for row in text.measure(scene, Size(480, 832, 81))}
    assert rows["resident"].ratio == pytest.approx(1.5)
    assert judge(rows["resident"], "NVIDIA H200") == Verdict(0.03, True)
    pinned, ordinary = rows["streamed from pinned RAM"], rows["streamed from RAM"]
    assert pinned.reference == ordinary.reference == Sample((0.1,))
    assert pinned.ratio == pytest.approx(1 / 1.1) and ordinary.ratio == pytest.approx(0.5)
    assert "5,500.0 MB pinned;" in pinned.note and "pinned" not in ordinary.note
    over = rows["streamed over bytes"]
    assert over.found is not None and over.found.median == pytest.approx(1.1)
    assert judge(over, "NVIDIA H200") == Verdict(1.2, True) and over.ratio is None
    assert not any(row.target for row in rows.values() if row.what not in ("resident", over.what))
    none = text.Streamed(1, Sample((0.2,)), Sample((0.2,)), 0, "under WSL little can be pinned")
    assert none.note == "nothing could be pinned: under WSL little can be pinned"
    some = text.Streamed(2, Sample((0.2,)), Sample((0.2,)), 1_000_000, "the driver pins no more (error 2)")
    assert some.note == "1.0 MB pinned, as the driver pins no more (error 2)"


# --- runs ---


def test_the_columns_of_a_run_add_up() -> None:
    timings = {"load": 6.0, "text": 1.0, "denoise": 10.5, "decode": 1.0, "save": 0.75, "done": 13.0}
    run = summed(timings, total=25.0, start=5.5)
    assert run["other"] == 25.0 - 24.0 and run["total"] == 25.0 and "save" not in run
    assert sum(seconds for phase, seconds in run.items() if phase != "total") == run["total"]
    assert summed({"text": 1.0}, 4.0) == {"text": 1.0, "other": 3.0, "total": 4.0}


# --- the page ---


def report(path: Path | None = None, card: str = "NVIDIA H200") -> Report:
    made = Report({"card": "NVIDIA H200", "torch": "2.11"}, card, {"repeats": 3}, path)
    whole = row_for("forward", 2.44, model=f"{FULL}-fp8", part="forward", what="one forward")
    made.rows = [
        replace(whole, found=Sample((2.5, 2.44, 2.41)), reference=Sample((3.63,)), note="fused"),
        replace(whole, what="ceiling: product", unit="FLOP/s", found=Sample((1.3e15,)), target=""),
        replace(whole, what="copy", unit="B/s", found=Sample((4.27e12,)), target=""),
        replace(whole, part="determinism", what="resident", target="", right=True, note="the same bits"),
    ]
    for phase, seconds in {"text": 0.02, "denoise": 7.9, "other": 0.55, "total": 9.4}.items():
        target = {"total": "run", "other": "run other"}.get(phase, "")
        run = replace(whole, part="run", what="warm", phase=phase, found=Sample((seconds,)), target=target)
        made.rows.append(run)
    watched = summarize([Reading(1755, 3201, 690.0, 60, 0x4)])
    made.gauged = [Gauged(f"{FULL}-fp8", SMALL_SIZE, "forward", 31.2, watched)]
    return made


def test_the_page_lines_up_and_says_what_was_reached() -> None:
    lines = report().lines()
    page = "\n".join(lines)
    assert f"{FULL}-fp8 {SMALL_SIZE}" in lines
    head = next(line for line in lines if line.startswith("PART") and "REFERENCE" in line)
    first = next(line for line in lines if "one forward" in line)
    for title, value in (
        ("MEDIAN", "2.440 s"),
        ("LEAST", "2.410 s"),
        ("REFERENCE", "3.630 s"),
        ("RATIO", "1.49x"),
    ):
        end = head.index(title) + len(title)
        assert first[:end].endswith(value), (title, first)
    assert "<= 1.850 s missed, 32% above" in first
    assert "1300 TFLOP/s" in page and "4270.0 GB/s" in page
    warm = next(line for line in lines if line.startswith("run warm"))
    assert "total <= 8.500 s missed, 11% above" in warm and "other <= 550" not in warm
    assert "other <= 600.00 ms reached" in warm
    assert any("1755 / 1755" in line and "power cap 100%" in line for line in lines)
    assert all("NOTE" in line or len(line) == len(line.rstrip()) for line in lines)


def test_rows_are_shown_once_and_as_soon_as_they_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    whole = report()
    shown = replace(whole, rows=[], gauged=[])
    seen = []
    for part in dict.fromkeys(row.part for row in whole.rows):
        shown.rows += [row for row in whole.rows if row.part == part]
        shown.show_rows()
        seen.append(capsys.readouterr().out)
        assert part in seen[-1] or "run " in seen[-1]
    shown.show_rows()
    assert capsys.readouterr().out == ""
    shown.gauged += whole.gauged
    shown.show()
    seen.append(capsys.readouterr().out)
    assert "MODEL" in seen[-1] and "one forward" not in seen[-1]
    for once in ("one forward", "torch  "):
        assert "".join(seen).count(once) == 1 and once in seen[0]


def test_elsewhere_there_is_no_target() -> None:
    page = "\n".join(report(card="NVIDIA GeForce RTX 4090").lines())
    assert "no target for this card" in page and "missed" not in page and "reached" not in page


def test_the_json_has_all_that_the_page_has(tmp_path: Path) -> None:
    made = report(tmp_path / "deep" / "bench.json")
    made.left_out.append("cold: no time")
    made.keep()
    found = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert found["machine"]["torch"] == "2.11" and found["settings"] == {"repeats": 3}
    first = found["rows"][0]
    assert first["found"]["values"] == [2.5, 2.44, 2.41] and first["goal"] == {"most": 1.85, "reached": False}
    assert first["ratio"] == pytest.approx(3.63 / 2.44)
    assert found["card"][0]["card"]["reasons"] == {"power cap": 1.0}
    assert found["left_out"] == ["cold: no time"] and found["failed"] is None


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .* name another file with --json"):
        report(tmp_path / "file" / "bench.json").keep()


def test_other_bits_are_a_failed_check() -> None:
    made = report()
    made.check()
    made.rows.append(replace(made.rows[3], what="mixed", right=False, note="DIFFERENT bits: ab, cd"))
    with pytest.raises(OutputCheckError, match=r"1 of 2 checks failed, first .* mixed: DIFFERENT bits"):
        made.check()
    assert any("FAILED" in line for line in made.lines())


def test_values_have_the_unit_that_suits_them() -> None:
    shown = [
        value_of(2.4412, "s"),
        value_of(0.0182, "s"),
        value_of(1.5e11, "FLOP/s"),
        value_of(1.066, "ratio"),
    ]
    assert shown == ["2.441 s", "18.20 ms", "150.0 GFLOP/s", "1.07"]
