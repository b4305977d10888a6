"""Tuning on the card: what it finds is right, and so is a run by it; a store makes the next one quick.

pytest -m gpu tests/gpu/test_tune_gpu.py -s

Small sizes; prints the tables of what it found.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from entrypoint.cli import cli
from entrypoint.trial_runs import run_trials
from runtime import tuner
from runtime.kernels import configs, launch
from runtime.layers import backends
from runtime.linear import Fp8Linear, Int8Linear, QuantizedLinear, module
from runtime.linear.quantize import FORMATS, dequantize, quantize_weight
from runtime.tuning import Store, apply_tiles, choose_attention, open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

CUDA = torch.device("cuda", 0)
TOKENS = 2049


@pytest.fixture(autouse=True)
def _few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config is compiled first, which takes seconds: three show as much as thirteen."""
    every = configs.candidates
    for place in (configs, tuner):
        monkeypatch.setattr(place, "candidates", lambda *given: every(*given)[:3])


@pytest.fixture(scope="module")
def trials() -> dict[str, object]:
    """What the process of its own says of this card."""
    began = time.perf_counter()
    found = run_trials("cuda:0")
    print(f"trials: {time.perf_counter() - began:.1f} s")
    assert "error" not in found, found
    return found


def test_the_trials_say_what_this_process_finds(trials: dict) -> None:  # type: ignore[type-arg]
    for one in trials["attention"]:
        state = "right" if one["ok"] else one["reason"][:90]
        print(f"  {one['name']:15} {one['bits']:3} {one['distance']} {one['ms']} {state}")
    rows = {one["name"]: one for one in trials["attention"]}
    assert rows.keys() == backends.BACKENDS.keys() and rows["sdpa"]["ok"] and rows["sdpa-math"]["ok"]
    assert rows["sdpa"]["ms"] > 0 and rows["sdpa-math"]["ms"] is None
    for name in ("sdpa", "sdpa-flash", "sdpa-cudnn"):
        assert backends.prove(name, CUDA).ok == rows[name]["ok"], name
    works = launch.trouble(CUDA) is None
    for form in ("fp8", "int8"):
        lowest = launch.LOWEST[FORMATS[form].dtype]
        assert trials["ways"][form]["fused"] == (works and launch.capability(CUDA) >= lowest)
        assert trials["ways"][form]["dequantized"]


def test_attention_is_kept_and_the_next_process_proves_one(tmp_path: Path) -> None:
    backends._fastest.cache_clear()
    backends.proofs.cache_clear()
    store = open_store(tmp_path, "cuda:0")
    began = time.perf_counter()
    choice = choose_attention(store, CUDA, TOKENS, heads=8)
    first = time.perf_counter() - began
    backends._fastest.cache_clear()
    backends.proofs.cache_clear()
    began = time.perf_counter()
    again = choose_attention(open_store(tmp_path, "cuda:0"), CUDA, TOKENS, heads=8)
    second = time.perf_counter() - began
    print(f"{choice.name}: {first:.2f} s, then {again.name}: {second:.2f} s")
    assert again.name == choice.name and again.proofs != () and second < first
    assert backends.rungs(again, CUDA) == backends.rungs(choice, CUDA)
    store = open_store(tmp_path, "cuda:0")
    store.avoid(choice.name, "a test")
    assert choose_attention(store, CUDA, TOKENS, heads=8).name != choice.name
    sixteen = choose_attention(store, CUDA, TOKENS, keys=512, heads=8)
    assert backends.BACKENDS[sixteen.name].bits >= 16


def test_attention_at_the_full_length(trials: dict) -> None:  # type: ignore[type-arg]
    proofs = [
        backends.Proof(one["name"], one["ok"], one["distance"] or float("nan"), one["reason"])
        for one in trials["attention"]
    ]
    for keys in (TOKENS, 512):
        shares: list[float] = []
        size = tuner.Size(TOKENS, keys, 8, 128)
        found = tuner.attention(CUDA, size, torch.bfloat16, proofs, shares.append)
        for one in found.entries:
            print(f"  {keys:5} {one.name:15} {one.ms} {one.distance} {one.reason[:90]}")
            if one.ok and one.distance is not None:
                assert one.distance <= backends.BOUNDS[backends.BACKENDS[one.name].bits]
        right = {proof.name for proof in proofs if proof.ok} - {"sdpa-math"}
        assert {one.name for one in found.entries if one.ms is not None} == right
        assert found.won in right
        assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_products_are_right_with_what_was_found(
    kind: type[QuantizedLinear],
    trials: dict,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[type-arg]
) -> None:
    monkeypatch.setattr(configs, "_used", {})
    monkeypatch.setattr(module, "_measured", {})
    form = kind.form
    if launch.capability(CUDA) < launch.LOWEST[form.dtype]:
        pytest.skip(f"this card has no {form.name}")
    columns, depth, rows = 1024, 512, 777
    right = [way for way, works in trials["ways"][form.name].items() if works]
    made = tuner.product(CUDA, form.name, columns, depth, rows, right, lambda _: None)
    for way in made.ways:
        print(f"  {form.name} {way.name:20} {way.ms} {way.error} {way.trouble[:80]}")
        assert way.error is None or way.error < 6e-3
    assert any(way.ms is not None for way in made.ways)
    store = Store(None)
    store.keep_product(made.product)
    for chosen in {made.product.way, "fused"} & set(right):
        store.keep_product(made.product.model_copy(update={"way": chosen}))
        assert apply_tiles(store, CUDA) == (made.product.tiles is not None)
        g = torch.Generator().manual_seed(3)
        weight, scale = quantize_weight(torch.randn(columns, depth, generator=g) / depth**0.5, form)
        linear = kind(depth, columns, True, CUDA)
        linear.weight, linear.weight_scale = weight.to(CUDA), scale.to(CUDA)
        linear.bias = torch.randn(columns, generator=g).to(CUDA)
        x = torch.randn(rows, depth, generator=g).bfloat16()
        expected = x.float() @ dequantize(weight, scale).t() + linear.bias.cpu()
        got = linear(x.to(CUDA))
        off = float((got.float().cpu() - expected).norm() / expected.norm())
        print(f"  {form.name} by {linear.way(x.to(CUDA))} ({chosen} kept): {off:.4f} from fp32")
        assert off < 0.05
        with launch.twins():
            twin = linear(x.to(CUDA))
        apart = float((got.float() - twin.float()).norm() / twin.float().norm())
        print(f"  its twin: {apart:.1e} away")
        assert apart < 1e-2
        assert linear.way(x.to(CUDA)) == "fused" or chosen != "fused"


def test_the_command_on_the_demo(tmp_path: Path) -> None:
    command = ["tune", "--model", "demo-int8", "--size", "64x64x9", "--cache", str(tmp_path), "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    path = Path(events[-1]["path"])
    assert path.is_file() and open_store(tmp_path, "cuda:0").path == path
    gauges = [event["gauge"] for event in events if event["event"] == "attention"]
    print("clocks and power:", gauges[0])
    assert open_store(tmp_path, "cuda:0").content.products
