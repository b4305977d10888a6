"""`t2v bench` on the CPU: every part of the tiny model, what it refuses, and whose weights it measures."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from entrypoint import bench_runs, bench_weights, synth
from entrypoint.bench import PARTS, read_parts
from entrypoint.bench_weights import models, weights_of
from runtime.bench import decode, determinism, gauge, text
from runtime.bench.samples import Row
from runtime.bench.scene import Scene
from runtime.bench.sizes import Size
from runtime.checkpoint.synth import NOTE_FILE
from runtime.errors import RequestError, WeightsError
from runtime.memory.plan import Blocks
from runtime.profiles import load_manifest, load_profile
from tests.conftest import Run

SMALL = "32x48x5"
FULL = "wan2.1-t2v-14b-4step"


@pytest.fixture
def bench(t2v: Run, tiny_checkpoint: Path) -> Run:
    """`t2v bench ARGUMENTS` of the tiny model at a small size, each thing measured once."""

    def run(*arguments: object, model: object = tiny_checkpoint, **extra: object) -> object:
        fixed = ("--model", model, "--device", "cpu", "--sizes", SMALL, "--repeats", 1)
        return t2v("bench", *fixed, *arguments, **extra)

    return run  # type: ignore[return-value]


def test_every_part_is_measured(bench: Run, workplace: Path, tmp_path: Path) -> None:
    done = bench("--json", tmp_path / "bench.json")
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["failed"] is None and found["left_out"] == []
    assert [one["part"] for one in found["card"]] == list(PARTS)
    rows = {(row["part"], row["what"], row.get("phase", "")): row for row in found["rows"]}
    for key in (
        ("forward", "one forward", ""),
        ("forward", "alone: products", ""),
        ("forward", "ceiling: copy", ""),
        ("decode", "warm, bytes included", ""),
        ("decode", "first call", ""),
        ("text", "resident", ""),
        ("text", "streamed from RAM", ""),
        ("run", "warm", "total"),
        ("run", "cold", "total"),
        ("run", "cold", "load"),
        ("cold", "first decode over warm", ""),
    ):
        assert rows[key]["found"]["median"] > 0, key
    bits = [row for row in found["rows"] if row["part"] == "determinism"]
    assert [row["what"] for row in bits] == ["resident", "all from RAM", "mixed", "all placements"]
    assert all(row["right"] for row in bits)
    assert all("goal" not in row for row in found["rows"])  # goals are the full model's
    for kind in ("warm", "cold"):
        run = {phase: row for (_, what, phase), row in rows.items() if what == kind}
        total = run.pop("total")["found"]["median"]
        assert sum(row["found"]["median"] for row in run.values()) == pytest.approx(total)
    for words in ("processor", "torch", "one forward", "run warm", "run cold", "the same bits"):
        assert words in done.stdout, words
    assert "the reference itself" in done.stdout  # a CPU has no faster way
    assert list(workplace.iterdir()) == []


def test_a_part_is_shown_before_the_next_begins(
    bench: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut = tmp_path / "bench.json"

    def last(scene: Scene, size: Size) -> Iterator[Row]:
        print("the next part begins")
        kept = json.loads(cut.read_text())
        assert kept["rows"] and not kept["failed"]
        yield scene.row("text", "resident", size)

    monkeypatch.setattr(text, "measure", last)
    done = bench("--only", "decode,text", "--json", cut)
    assert done.exit_code == 0, done.stderr
    shown = done.stdout
    assert shown.index("first call") < shown.index("the next part begins") < shown.index("resident")
    assert shown.count("first call") == 1


def test_the_card_is_that_of_the_measurement(
    bench: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights load at low power; what is shown are the forwards."""

    class Loaded(gauge.Gauge):
        depth = 0

        @contextmanager
        def during(self) -> Iterator[list[gauge.Reading]]:
            self.depth += 1
            readings: list[gauge.Reading] = []
            yield readings
            readings.append(gauge.Reading(1000 * self.depth, 1, 100.0 * self.depth, 40, 0))
            self.depth -= 1

    monkeypatch.setattr(gauge, "Gauge", Loaded)
    done = bench("--only", "forward,decode,text", "--json", tmp_path / "bench.json")
    assert done.exit_code == 0, done.stderr
    cards = json.loads((tmp_path / "bench.json").read_text())["card"]
    assert [one["part"] for one in cards] == ["forward", "decode", "text"]
    assert all(one["card"]["watts"] == [200.0, 200.0] for one in cards)


def test_without_warm_runs_the_cold_ones_are_compared_with_nothing(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = {"start": 1.0, "decode": 2.0, "other": 1.0, "total": 4.0}
    monkeypatch.setattr(bench_runs, "_child", lambda command: phases)
    done = bench("--only", "cold")
    assert done.exit_code == 0 and "over warm" not in done.stdout
    monkeypatch.setattr(bench_runs, "_once", lambda *_: {"decode": 0.5, "other": 0.5, "total": 1.0})
    done = bench("--only", "run,cold")
    (line,) = (line for line in done.stdout.splitlines() if "first decode over warm" in line)
    assert "4.00" in line


def test_json_on_stdout_is_all_that_is_there(bench: Run) -> None:
    done = bench("--only", "text", "--json", "-")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["event"] == "bench"
    assert "resident" in done.stderr


def test_a_size_and_formats_of_a_named_model(bench: Run) -> None:
    done = bench("--only", "text", "--formats", "int8,fp8", model="demo")
    assert done.exit_code == 0
    assert done.stdout.index("demo-int8") < done.stdout.index("demo-fp8")
    assert [one.name for one in models(FULL, "bf16,fp8", load_profile("cpu"))] == [
        f"{FULL}-bf16",
        f"{FULL}-fp8",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--sizes", "480x832"], 2, "expected HEIGHTxWIDTHxFRAMES"),
        (["--sizes", "30x48x5"], 2, "height is 30; expected a multiple of 16"),
        (["--only", "forward,sing"], 2, "--only is 'forward,sing'; expected one or more of forward, decode"),
        (["--only", ","], 2, "expected one or more of"),
        (["--formats", "fp8"], 2, "leave --formats out, or name a model"),
        (["--formats", "fp4", "--model", "demo"], 2, "expected one or more of bf16, fp8, int8"),
        (["--repeats", "0"], 2, "--repeats"),
        (["--budget", "-1"], 2, "--budget"),
        (["--attention", "sing"], 2, "attention 'sing' is unknown"),
        (["--model", "no-such-model"], 2, "No model is called"),
        (["--profile", "no-such-profile"], 2, "No profile is called"),
        (["--device", "cuda:0"], 5, "needs CUDA"),
        (["--json", "/proc/no/bench.json"], 2, "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(bench: Run, arguments: list[str], code: int, words: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == code, done.stderr
    assert words in done.stderr and done.stderr.count("error:") == 1


def test_weights_that_are_broken_are_told(bench: Run, tmp_path: Path) -> None:
    place = tmp_path / "empty"
    place.mkdir()
    done = bench(model=place)
    assert done.exit_code == 3 and str(place) in done.stderr


def test_parts_come_in_their_order() -> None:
    assert read_parts("cold, forward") == ("forward", "cold")


def test_no_part_begins_after_the_budget(bench: Run) -> None:
    done = bench("--budget", 0, "--only", "text,run")
    assert done.exit_code == 0
    assert done.stdout.count("--budget are over") == 2


# --- what goes wrong on the way ---


def test_other_bits_end_with_exit_6(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(range(100))
    monkeypatch.setattr(determinism, "_digest", lambda pipe, size: (f"{next(made):064x}", 1.0))
    done = bench("--only", "determinism")
    assert done.exit_code == 6
    assert "DIFFERENT bits" in done.stdout and "FAILED" in done.stdout
    assert "4 of 4 checks failed" in done.stderr


def test_what_was_found_outlives_an_error(
    bench: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(scene: Scene, size: Size) -> Iterator[Row]:
        yield scene.row("decode", "half of it", size)
        raise WeightsError("The VAE is gone; bring it back.")

    monkeypatch.setattr(decode, "measure", fail)
    done = bench("--only", "forward,decode", "--json", tmp_path / "bench.json")
    assert done.exit_code == 3 and "The VAE is gone" in done.stderr
    assert "one forward" in done.stdout and "half of it" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["failed"] == "WeightsError: The VAE is gone; bring it back."
    assert len(found["rows"]) > 5


def test_a_part_that_does_not_fit_is_passed_by(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scene: Scene, size: Size) -> Iterator[Row]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more.")
        yield

    monkeypatch.setattr(decode, "measure", fail)
    done = bench("--only", "decode,text")
    assert done.exit_code == 0
    assert f"{SMALL} decode: out of memory (CUDA out of memory. Tried to allocate 9 GiB)" in done.stdout
    assert "streamed from RAM" in done.stdout


def test_a_cold_run_that_fails_says_why(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_runs.command_of
    monkeypatch.setattr(bench_runs, "command_of", lambda *given: [*real(*given), "--fps", "0"])
    done = bench("--only", "cold")
    assert done.exit_code == 2
    assert "The cold run ended with exit status 2: fps is 0; expected 1 to 120" in done.stderr


# --- placements ---


def test_placements_are_resident_from_ram_and_mixed(tiny_checkpoint: Path) -> None:
    from runtime.pipeline import Pipeline

    with Pipeline.load(model=tiny_checkpoint, device="cpu", request=Size(32, 48, 5).request()) as pipe:
        plan = pipe.plan
        assert plan is not None
        offered = dict(determinism.placements(plan))
        assert offered["resident"] == Blocks((0, 1), (), 0)
        assert offered["all from RAM"] == Blocks((), (0, 1), 2)
        assert offered["mixed"].resident and offered["mixed"].slots
        assert determinism.too_much(plan, plan.blocks) == ""
        tight = replace(plan.inputs, budget=replace(plan.budget, ram=plan.ram))
        assert "do not fit the RAM" in determinism.too_much(
            replace(plan, inputs=tight), offered["all from RAM"]
        )


# --- whose weights ---


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where random weights were made; they are a note alone, and complete once it is there."""
    places: list[Path] = []

    def write(manifest: object, target: Path, **rest: object) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / NOTE_FILE).write_text("{}")
        places.append(target)

    def open_files(manifest: object, directory: Path) -> None:
        if not (directory / "whole").exists():
            raise WeightsError(f"{directory} lacks a file.")

    monkeypatch.setattr(synth, "write", write)
    monkeypatch.setattr(bench_weights, "open_files", open_files)
    return places


MANIFEST, PROFILE = load_manifest(f"{FULL}-fp8"), load_profile("cpu")


def test_random_weights_are_made_and_removed(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with weights_of(MANIFEST, FULL, PROFILE, None, may_make=False) as (manifest, place):
        assert made == [place] and place.is_dir() and manifest is MANIFEST
    assert not place.exists()
    assert "random weights" in capsys.readouterr().err


def test_random_weights_stay_where_they_were_asked_for(made: list[Path], tmp_path: Path) -> None:
    for _ in range(2):  # the second time they are found, incomplete, and completed
        with weights_of(MANIFEST, FULL, PROFILE, tmp_path / "new", may_make=True) as (_, place):
            assert place == tmp_path / "new"
    (tmp_path / "new" / "whole").write_text("")
    with weights_of(MANIFEST, FULL, PROFILE, tmp_path / "new", may_make=True):
        pass
    assert made == [tmp_path / "new"] * 2 and (tmp_path / "new").is_dir()


def test_a_machines_own_place_for_weights_never_gets_random_ones(made: list[Path], tmp_path: Path) -> None:
    for standing in (tmp_path, tmp_path / "missing"):
        with weights_of(MANIFEST, FULL, PROFILE, standing, may_make=False) as (_, place):
            assert place not in (tmp_path, tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_never_go_among_other_files(made: list[Path], tmp_path: Path) -> None:
    (tmp_path / "block_0.safetensors").write_text("someone's")
    with (
        pytest.raises(WeightsError, match="lacks a file"),
        weights_of(MANIFEST, FULL, PROFILE, tmp_path, may_make=True),
    ):
        pass
    assert made == []


def test_a_directory_has_no_formats(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="is the directory"):
        models(str(tiny_checkpoint), "fp8", PROFILE)
    (manifest,) = models(str(tiny_checkpoint), None, PROFILE)
    with weights_of(manifest, str(tiny_checkpoint), PROFILE, None, may_make=False) as (_, place):
        assert place == tiny_checkpoint
