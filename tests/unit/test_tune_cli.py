"""`t2v tune` and the trials behind it, with a made-up card: what is measured, shown, kept and refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from entrypoint import gpu_checks, kernel_trials, trial_runs, tune
from entrypoint.findings import Scene
from entrypoint.tune_progress import JsonProgress, LiveProgress, Progress, make_progress
from runtime import device, tuner, tuning
from runtime.errors import DeviceError
from runtime.kernels import configs
from runtime.kernels.tune import Timing
from runtime.kernels.w8a8 import w8a8_torch
from runtime.layers import backends
from runtime.layers.backends import BACKENDS, Proof
from runtime.tuning_file import Attention, Entry, Product, setting_of
from tests.conftest import Run
from tests.unit.test_device import RTX4090, install_driver
from tests.unit.test_doctor import scene, well_formed

CPU = torch.device("cpu")
SIZE = ("--size", "192x192x33")
TOKENS = 9 * 12 * 12
CONFIG = configs.Config(128, 128, 64, stages=4)
RIGHT = {"sage2": 0.02, "sdpa": 0.001, "sdpa-math": 0.0005}
TRIALS: dict[str, Any] = {
    "ways": {
        "fp8": {"rowwise": True, "unscaled": True, "fused": True, "dequantized": True},
        "int8": {"fused": True, "integer": True, "dequantized": True},
    },
    "attention": [
        {
            "name": name,
            "bits": backend.bits,
            "ok": name in RIGHT,
            "distance": RIGHT.get(name),
            "reason": "" if name in RIGHT else "not installed, or not for this GPU",
            "ms": None,
        }
        for name, backend in BACKENDS.items()
    ],
}
TIMES = {"sage2": 3.0, "sdpa": 9.0}


def scaled_mm(
    q: Tensor,
    w: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """torch's, which takes a minute for this on a CPU."""
    y = q.float() @ w.float() * scale_a * scale_b
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> dict[str, Any]:
    """A card that is this CPU: times are made up, numbers are computed. Change what it says of itself."""
    here: dict[str, Any] = {"trials": TRIALS, "times": dict(TIMES), "wrong": set(), "free": 1 << 40}
    install_driver(monkeypatch, RTX4090)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "torch_cuda", lambda: (12, 8))
    monkeypatch.setattr(trial_runs, "run_trials", lambda place: json.loads(json.dumps(here["trials"])))
    monkeypatch.setattr(tune, "_start", lambda place: CPU)
    monkeypatch.setattr(tuner, "free_bytes", lambda _: here["free"])

    def rough(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return backends.sdpa(q, k, v, scale) * 1.02

    def garbage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.randn_like(q)

    def found(name: str, _: object) -> Any:
        return garbage if name in here["wrong"] else rough if name == "sage2" else backends.sdpa

    monkeypatch.setattr(backends, "available", found)
    # No kernel of ours runs here: its twin in the place of it, and its tiles as they would have been timed.
    monkeypatch.setattr(tuner, "w8a8_triton", lambda *given: w8a8_torch(*given[:7]))
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(
        tuner.tune,
        "tune_w8a8",
        lambda *_, **__: [(CONFIG, Timing("", 1.0)), (CONFIG, Timing("", None, "no"))],
    )

    def timed(runs: dict[str, Any], repeats: int, clock: Callable[[Any], float]) -> list[Timing]:
        monkeypatch.setattr(tuner.tune, "milliseconds", lambda run: 0.1)
        for _ in range(1 + repeats):
            for run in runs.values():
                clock(run)
        return sorted(
            (Timing(name, here["times"].get(name, 5.0)) for name in runs),
            key=lambda one: one.milliseconds or 0.0,
        )

    monkeypatch.setattr(tuner.tune, "time_candidates", timed)
    return here


def events_of(text: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        one = json.loads(line)
        found.setdefault(one.pop("event"), []).append(one)
    return found


# ----------------------------------------------------------------------------------------------- refusals


def test_on_a_cpu_one_sentence(t2v: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch)
    done = t2v("tune")
    assert done.exit_code == DeviceError.exit_code and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "t2v tune measures a GPU, and has none" in line and "finds no GPU" in line
    done = t2v("tune", "--device", "cpu", "--json")
    assert done.exit_code == 5
    assert "leave --device and --profile out" in json.loads(done.stdout.splitlines()[-1])["message"]


@pytest.mark.parametrize("size", ["480", "480x832", "axbxc", "480x832x81x2", "-1x2x3", ""])
def test_a_size_that_is_none(t2v: Run, size: str) -> None:
    done = t2v("tune", "--size", size)
    assert done.exit_code == 2 and "480x832x81" in done.stderr


def test_a_size_that_the_model_does_not_take(t2v: Run, card: dict[str, Any]) -> None:
    done = t2v("tune", "--model", "demo-fp8", "--size", "65x64x9")
    assert done.exit_code == 2 and "height is 65" in done.stderr


def test_a_card_on_which_nothing_runs(t2v: Run, card: dict[str, Any]) -> None:
    card["trials"] = {"error": "signal 11"}
    done = t2v("tune", "--model", "demo-fp8", *SIZE)
    assert done.exit_code == 5 and "torch cannot compute on cuda:0 (signal 11)" in done.stderr


# ----------------------------------------------------------------------------------------- what it measures


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_tables_and_what_is_kept(t2v: Run, card: dict[str, Any], tmp_path: Path, form: str) -> None:
    card["times"] |= {"fused": 1.0, "rowwise": 2.0, "integer": 2.5}
    done = t2v("tune", "--model", f"demo-{form}", *SIZE, "--cache", tmp_path)
    assert done.exit_code == 0, done.output
    print(done.stdout)
    lines = done.stdout.splitlines()
    heads = [line for line in lines if line.startswith(("SELF", "CROSS", "PRODUCT"))]
    assert [head.split()[0] for head in heads] == ["SELF", "CROSS", "PRODUCT"]
    for head in heads:  # the columns stand under their heads: numbers end where their head ends
        end = head.index("MS") + 2
        rows = lines[lines.index(head) + 1 :]
        rows = rows[: rows.index("")]
        assert rows and all(row[end : end + 2].strip() == "" and row[end - 1] != " " for row in rows)
    used = [line.split()[0] for line in lines if line.endswith("  used")]
    assert used[:2] == ["sage2", "sdpa"], "8 bits where there are many keys"
    assert "torch" not in done.stderr and "remembered in" in done.stderr and "% " not in done.stdout
    assert "product" in done.stderr and "100%" in done.stderr

    store = tuning.Store(tmp_path, setting_of(RTX4090))
    assert str(store.path) in done.stderr and store.take_notes() == ()
    known = store.content.attention[0]
    assert (known.tokens, known.won, known.entries[0].name, known.entries[0].ms) == (
        TOKENS,
        *2 * ("sage2",),
        3.0,
    )
    assert known.entries[0].distance == pytest.approx(0.02, rel=0.2), "measured at this length"
    assert {one.dtype for one in store.content.products} == {form} and store.content.products
    for one in store.content.products:
        assert one.way == "fused" and one.tiles is not None and one.tiles.stages == 4


def test_json(t2v: Run, card: dict[str, Any], tmp_path: Path) -> None:
    card["times"] |= {"rowwise": 1.0, "fused": 0.98, "rowwise, fast sums": 0.5}
    done = t2v("tune", "--model", "demo-fp8", *SIZE, "--cache", tmp_path, "--json")
    assert done.exit_code == 0
    found = events_of(done.stdout)
    self_, cross = found["attention"]
    assert (self_["used"], cross["used"]) == ("sage2", "sdpa") and cross["keys"] != self_["keys"]
    assert {one["name"] for one in self_["backends"]} == set(BACKENDS)
    assert {one["name"]: one["bits"] for one in self_["backends"]} == {n: b.bits for n, b in BACKENDS.items()}
    for one in found["product"]:
        assert one["used"] == "rowwise", "fast sums are shown, not used, and 2 % are noise"
        errors = {way["name"]: way["error"] for way in one["ways"]}
        assert errors["fused"] < 6e-3 and one["tiles"] == str(CONFIG)
    done_shares = [one["done"] for one in found["progress"]]
    assert done_shares == sorted(done_shares) and done_shares[-1] == pytest.approx(1.0)
    (result,) = found["result"]
    assert Path(result["path"]).is_file() and result["seconds"] > 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_part_ends_whole_though_not_all_of_it_is_timed(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Backends that are far behind are looked at once, those that break not at all."""
    times = {"sdpa": 1.0, "sdpa-flash": 9.0, "sdpa-efficient": 1.0}
    names = [*times][:count]
    runs = {name: lambda *given: backends.sdpa(*given) for name in names}
    monkeypatch.setattr(backends, "available", lambda name, _: runs.get(name))

    def milliseconds(run: Any, calls: int = 1) -> float:
        name = next(name for name in names if runs[name] is run.func)
        if name == "sdpa-efficient":
            raise RuntimeError("too much shared memory")
        run()
        return times[name]

    monkeypatch.setattr(tuner.tune, "milliseconds", milliseconds)
    shares: list[float] = []
    proofs = [Proof(name, name in names, 0.001) for name in BACKENDS]
    found = tuner.attention(CPU, tuner.Size(70, 70, 2, 64), torch.bfloat16, proofs, shares.append)
    timed = {one.name for one in found.entries if one.ms is not None}
    assert timed == {*names} - {"sdpa-efficient"}
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_product_ends_whole_though_not_all_of_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(tuner.tune, "tune_w8a8", lambda *_, **__: [])
    times = iter([1.0, *[9.0] * 50])  # the first is the best, the others are dropped after one look
    monkeypatch.setattr(tuner.tune, "milliseconds", lambda run, calls=1: next(times))
    shares: list[float] = []
    right = ("rowwise", "unscaled", "fused", "dequantized")
    made = tuner.product(CPU, "fp8", 32, 64, 40, right, shares.append)
    assert len([way for way in made.ways if way.ms is not None]) >= 2
    assert 0.7 in shares and shares == sorted(shares) and shares[-1] == 1.0


def test_what_is_wrong_at_the_full_length_is_not_used(t2v: Run, card: dict[str, Any], tmp_path: Path) -> None:
    card["wrong"].add("sage2")
    done = t2v("tune", "--model", "demo", *SIZE, "--cache", tmp_path)
    assert done.exit_code == 0 and "expected 0.06 at most" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  used")] == [
        "sdpa",
        "sdpa",
    ]
    assert "is bf16: its products are torch's" in done.stderr


def test_what_was_wrong_in_a_run_is_left_out_until_it_is_forgotten(
    t2v: Run, card: dict[str, Any], tmp_path: Path
) -> None:
    tuning.Store(tmp_path, setting_of(RTX4090)).avoid("sage2", "NaN at step 2")
    done = t2v("tune", "--model", "demo", *SIZE, "--cache", tmp_path)
    assert "left out: wrong numbers in a run before" in done.stdout
    used = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  used")]
    assert used == ["sdpa", "sdpa"]
    done = t2v("tune", "--model", "demo", *SIZE, "--cache", tmp_path, "--forget")
    used = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  used")]
    assert used == ["sage2", "sdpa"] and not tuning.Store(tmp_path, setting_of(RTX4090)).avoided()


def test_without_a_cache_without_room_and_without_triton(
    t2v: Run, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card["free"] = 30 * 7 * 2 * 4 * 32  # about thirty tokens
    no_kernels = {form: {w: w != "fused" for w in ways} for form, ways in TRIALS["ways"].items()}
    card["trials"] = {**TRIALS, "ways": no_kernels}
    monkeypatch.setattr(tune, "_reason_against_kernels", lambda _: "Triton is not installed")
    done = t2v("tune", "--model", "demo-int8", *SIZE, "--cache", "none")
    assert done.exit_code == 0, done.output
    assert "nothing is kept" in done.stderr and "do not fit in the memory that is free" in done.stderr
    assert "our kernels cannot run here (Triton is not installed)" in done.stderr
    assert "integer" in done.stdout and "fused" not in done.stdout


def test_a_damaged_file_is_a_word_and_is_mended(t2v: Run, card: dict[str, Any], tmp_path: Path) -> None:
    store = tuning.Store(tmp_path, setting_of(RTX4090))
    assert store.path is not None
    store.path.parent.mkdir(parents=True)
    store.path.write_text("{")
    done = t2v("tune", "--model", "demo", *SIZE, "--cache", tmp_path)
    assert done.exit_code == 0 and "no JSON" in done.stderr
    assert tuning.Store(tmp_path, setting_of(RTX4090)).content.attention


# ------------------------------------------------------------------------------------------------ progress


def test_the_time_left() -> None:
    now = [0.0]
    progress = Progress({"a": 10.0, "b": 30.0}, clock=lambda: now[0])
    assert progress.left is None
    tick = progress.ticker("a")
    now[0] = 4.0
    tick(0.5)
    assert progress.share == pytest.approx(0.125) and progress.left == pytest.approx(28.0)
    progress.end("a")
    now[0] = 20.0
    progress.ticker("b")(7.0)
    assert progress.share == 1.0 and progress.left == 0.0


def test_progress_suits_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"a": 1.0}
    assert type(make_progress(parts, as_json=True)) is JsonProgress
    assert type(make_progress(parts, as_json=False)) is Progress
    monkeypatch.setattr(
        sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda _: 0, flush=lambda: 0)
    )
    with make_progress(parts, as_json=False) as live:
        assert type(live) is LiveProgress
        live.ticker("a")(0.5)
        live.end("a")


# -------------------------------------------------------------------------------------------------- trials


def say(*lines: dict[str, Any], ending: str = "") -> str:
    code = "import json, os\n" + "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines)
    return code + ending


def proof(name: str, ok: bool = True) -> dict[str, Any]:
    return {"attention": {"name": name, "ok": ok, "distance": 0.1, "reason": "" if ok else "is wrong"}}


FIRST = ({"ways": {"fp8": {"rowwise": True}}}, {"backends": {"a": 8, "b": 8, "c": 16, "d": 16}})


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Give the programs that are started one after another; returns what each was asked."""
    run = subprocess.run

    def prepare(*programs: str) -> list[list[str]]:
        asked: list[list[str]] = []

        def instead(command: list[str], **options: Any) -> Any:
            asked.append(command[3:])
            return run([sys.executable, "-c", programs[len(asked) - 1]], **options)

        monkeypatch.setattr(subprocess, "run", instead)
        return asked

    return prepare


def test_a_backend_that_ends_the_trials_is_left_out_and_the_rest_tried(
    processes: Callable[..., list[list[str]]],
) -> None:
    asked = processes(
        say(*FIRST, {"trying": "a"}, proof("a"), {"trying": "b"}, ending="os.kill(os.getpid(), 11)"),
        say(FIRST[1], {"trying": "c"}, proof("c", False)),  # it left the device unusable
        say(
            FIRST[1],
            {"trying": "d"},
            proof("d"),
            {"trying": "times"},
            {"times": {"a": 1.5, "d": 2}, "tokens": 9},
            {"done": True},
        ),
    )
    found = trial_runs.run_trials("cuda:0")
    assert asked == [["cuda:0"], ["cuda:0", "a,b", "a"], ["cuda:0", "a,b,c", "a"]]
    rows = {one["name"]: one for one in found["attention"]}
    assert [rows[name]["ok"] for name in "abcd"] == [True, False, False, True]
    assert "ended the process (signal 11)" in rows["b"]["reason"]
    assert [rows[name]["ms"] for name in "abcd"] == [1.5, None, None, 2] and found["tokens"] == 9
    assert [rows[name]["bits"] for name in "abcd"] == [8, 8, 16, 16] and found["ways"] == FIRST[0]["ways"]


def test_trials_that_cannot_go_on(processes: Callable[..., list[list[str]]]) -> None:
    crash = "os.kill(os.getpid(), 11)"
    processes(say(*FIRST, {"trying": "a"}, proof("a"), {"trying": "times"}, ending=crash))
    found = trial_runs.run_trials("cuda:0")
    assert [one["ok"] for one in found["attention"]] == [True, False, False, False]
    assert found["attention"][1]["reason"] == trial_runs.NOT_TRIED
    processes(say(*FIRST, ending=crash))
    assert {one["reason"] for one in trial_runs.run_trials("cuda:0")["attention"]} == {trial_runs.NOT_TRIED}
    asked = processes(
        say(*FIRST, {"trying": "a"}, ending=crash),
        *(say(FIRST[1], {"trying": name}, ending=crash) for name in "bcd"),
    )
    assert all("signal 11" in one["reason"] for one in trial_runs.run_trials("cuda:0")["attention"][:4])
    assert len(asked) == trial_runs.MOST_STARTS
    processes(say(FIRST[0], {"error": "RuntimeError: late"}))
    assert trial_runs.run_trials("cuda:0") == FIRST[0]
    processes(say({"error": "RuntimeError: no device"}))
    assert trial_runs.run_trials("cuda:0") == {"error": "RuntimeError: no device"}
    processes(
        say(*FIRST, {"trying": "a"}, ending="import time; time.sleep(9)"), say(FIRST[1], {"done": True})
    )
    found = trial_runs.run_trials("cuda:0", seconds=0.7)
    assert "more than" in found["attention"][0]["reason"]


def test_the_lines_of_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.proofs.cache_clear()
    lines = list(kernel_trials.attention_trials("cpu", ("sage2",), ()))
    assert lines[0] == {"backends": {name: one.bits for name, one in BACKENDS.items()}}
    found = {line["attention"]["name"]: line["attention"]["ok"] for line in lines if "attention" in line}
    assert {name for name, ok in found.items() if ok} == {"sdpa", "sdpa-math"} and "sage2" not in found
    assert {"trying": "sage2"} not in lines and lines[-1] == {"done": True}
    json.dumps(lines, allow_nan=False)
    monkeypatch.setattr(kernel_trials, "_alive", lambda _: False)
    monkeypatch.setattr(backends, "prove", lambda name, _: Proof(name, False, reason="x\ny"))
    lines = list(kernel_trials.attention_trials("cpu"))
    assert [*lines[1], *lines[2]] == ["trying", "attention"] and len(lines) == 3
    assert lines[2]["attention"]["reason"] == "x y"
    assert not kernel_trials.trials("cpu")["int8"]["fused"], "its twin is no kernel"


# -------------------------------------------------------------------------------------------------- doctor


def attention_answer(**times: float) -> dict[str, Any]:
    rows = [{**one, "ms": times.get(one["name"].replace("-", "_"))} for one in TRIALS["attention"]]
    return {"ways": TRIALS["ways"], "attention": rows, "tokens": 8192}


def test_doctor_shows_every_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from entrypoint import doctor

    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: (12, 8))
    monkeypatch.setattr(gpu_checks, "run_trials", lambda _: attention_answer(sage2=3.21, sdpa=9.5))
    found = [well_formed(one) for one in gpu_checks.check_kernels(scene(RTX4090))]
    assert [one.name for one in found] == ["8-bit kernels", "attention"]
    assert found[1].found == "2 ways right here, 1 in 8 bits, fastest sage2: 3.21 ms for 8192 tokens"
    doctor._show(found, as_json=False)
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["ATTENTION", "BITS", "DISTANCE", "MS", "HERE"]
    assert table[1].split() == ["sage2", "8", "0.0200", "3.210", "right"]
    assert [line.split()[0] for line in table[2:4]] == ["sdpa", "sdpa-math"] and len(table) == 1 + len(
        BACKENDS
    )
    assert "not installed" in table[-1]
    doctor._show(found, as_json=True)
    event = json.loads(capsys.readouterr().out.splitlines()[1])
    assert event["table"][0] == {
        "attention": "sage2",
        "bits": "8",
        "distance": "0.0200",
        "ms": "3.210",
        "here": "right",
    }
    slow = attention_answer()
    for one in slow["attention"]:
        one["ok"] = one["name"] == "sdpa-math"
    monkeypatch.setattr(gpu_checks, "run_trials", lambda _: slow)
    assert [one.state for one in gpu_checks.check_kernels(scene(RTX4090))] == ["ok", "warn"]


def tuned(of: Scene) -> Any:
    (found,) = gpu_checks.check_tuning(of)
    return well_formed(found)


def test_doctor_shows_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2V_CACHE", str(tmp_path))
    assert not list(gpu_checks.check_tuning(scene()))
    assert "nothing measured yet" in tuned(scene(RTX4090)).found
    store = tuning.Store(tmp_path, setting_of(RTX4090))
    entries = (Entry(name="sage2", ok=True, ms=28.1), Entry(name="sdpa", ok=True, ms=40.0))
    store.keep_attention(
        Attention(
            tokens=32760,
            keys=32760,
            heads=40,
            head_dim=128,
            dtype="bfloat16",
            date="2026-11-22",
            won="sage2",
            entries=entries,
        )
    )
    store.keep_product(
        Product(
            dtype="fp8",
            columns=5120,
            depth=5120,
            rows=4096,
            date="2026-11-22",
            way="rowwise",
            tiles=None,
            ms={"rowwise": 1.25},
        )
    )
    found = tuned(scene(RTX4090))
    assert found.state == "ok" and "1 size of attention and 1 product" in found.found
    assert [row[1:] for row in found.table.rows] == [
        ("sage2", "28.10", "2026-11-22"),
        ("rowwise", "1.25", "2026-11-22"),
    ]
    store.avoid("sage2", "NaN at step 2")
    found = tuned(scene(RTX4090))
    assert found.state == "warn" and "sage2 since 20" in found.found and "--forget" in found.fix
    assert found.table.rows[0][1] == "sage2 (left out)"
    assert store.path is not None
    store.path.write_text("{")
    assert "no JSON" in tuned(scene(RTX4090)).found
    monkeypatch.setenv("T2V_CACHE", "none")
    assert "nothing is kept" in tuned(scene(RTX4090)).found
