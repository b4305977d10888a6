"""`t2v plan`: a table, a picture, JSON; for cards that are not here, without weights and without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from entrypoint.cli import cli
from entrypoint.plan_page import LEGEND, MARKS, PIPE_WIDTH, Subject, as_text
from runtime.device import Gpu, Inventory
from runtime.memory.costs import CUDA_CONTEXT
from runtime.memory.plan import Job
from runtime.memory.planning import plan_run
from runtime.profiles import list_profiles, load_manifest, load_profile
from runtime.tuning import open_store
from runtime.tuning_file import Attention, Entry, today
from tests.fake_plans import GIB, computer

ROOT = Path(__file__).resolve().parents[2]
FP8 = load_manifest("wan2.1-t2v-14b-4step-fp8")
TIMES = {"cudnn-fp8": 3.4, "sdpa": 4.8}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def report(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_card_that_is_not_here_is_planned_without_torch() -> None:
    code = (
        "import sys\nfrom entrypoint.cli import cli\n"
        "try: cli.main(['plan', '--profile', 'rtx4060', '--ram', '16'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = [m for m in ('torch', 'rich', 'numpy', 'av') if m in sys.modules]\n"
        "print(loaded, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "rtx4060: GeForce RTX 4060" in done.stdout and "not in this machine" in done.stdout


@pytest.mark.parametrize("profile", [name for name in list_profiles() if name != "auto"])
def test_every_profile_has_a_plan(profile: str) -> None:
    found = report("--profile", profile, "--ram", "64", "--frames", "17")
    assert found["profile"] == profile and found["event"] == "plan"
    predicted, placement = found["predicted"], found["placement"]
    assert placement["blocks"] == 40
    assert predicted["total_seconds"] == pytest.approx(sum(predicted["seconds"].values()), abs=0.01)
    assert set(predicted["limits"].values()) <= {"compute", "disk", "PCIe", "RAM"}
    assert max(predicted["ram"].values()) <= found["budget"]["ram"]
    for phase, parts in predicted["parts"].items():
        if profile != "cpu":
            assert sum(parts.values()) == predicted["vram"][phase] <= found["budget"]["vram"]


def test_sizes_and_ceilings_arrive() -> None:
    small = report("--profile", "rtx4090", "--ram", "32", "--vram", "6")
    large = report(
        "--profile", "rtx4090", "--ram", "32", "--height", "720", "--width", "1280", "--frames", "49"
    )
    assert small["job"]["height"] == 480 and large["job"] | {"height": 720, "frames": 49} == large["job"]
    assert max(small["predicted"]["vram"].values()) < 5.5 * GIB < max(large["predicted"]["vram"].values())
    assert small["quantization"] == "fp8" and small["sizes_from"] == "manifest"
    other = report("--profile", "rtx4090", "--ram", "32", "--model", "wan2.1-t2v-14b-4step-bf16")
    assert other["quantization"] == "bf16" and len(other["placement"]["resident"]) < 40


def test_what_does_not_fit_is_exit_4_in_one_sentence() -> None:
    done = run("--profile", "rtx4060", "--vram", "2.3", "--ram", "16")
    assert done.exit_code == 4 and not done.stdout
    assert done.stderr.startswith("t2v: error: A video of 480x832x81 with fp8 weights needs at least")
    assert done.stderr.count("\n") == 1 and "--frames" in done.stderr and "--height" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--height", "481"),
        ("--frames", "80"),
        ("--vram", "0"),
        ("--ram", "nan"),
        ("--profile", "rtx4061"),
        ("--steps", "8"),
        ("--model", "no-such-model"),
    ],
)
def test_bad_arguments_are_exit_2(arguments: tuple[str, str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and not done.stdout and done.stderr.count("\n") == 1


def test_auto_takes_the_card_that_is_here_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "NVIDIA GeForce RTX 4070", "GPU-7", 12 * GIB, 10 * GIB, (8, 9), "580.1")
    monkeypatch.setattr("runtime.device.inventory", lambda: Inventory((gpu,), (13, 0)))
    monkeypatch.setattr("runtime.device.torch_cuda", lambda: (12, 8))
    found = report("--ram", "16")
    assert (found["profile"], found["gpu"]) == ("rtx4070", gpu.name)
    assert "profile rtx4070 (its own)" in found["profile_reason"]
    assert found["budget"]["vram"] < 9.5 * GIB and "10 GiB free" in found["budget"]["vram_source"]
    shown = run("--ram", "16").stdout
    assert "profile rtx4070 (its own)" in shown and "not in this machine" not in shown
    named = report("--profile", "rtx4060", "--ram", "16")  # a ceiling on the larger card
    assert named["budget"]["vram"] == 8 * GIB - CUDA_CONTEXT and named["profile_reason"] is None


def test_the_attention_that_won_on_this_card_is_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu(0, "NVIDIA H100", "GPU-7", 80 * GIB, 79 * GIB, (9, 0), "580.1")
    monkeypatch.setattr("runtime.device.inventory", lambda: Inventory((gpu,), (13, 0)))
    monkeypatch.setattr("runtime.device.torch_cuda", lambda: (13, 0))
    here = ("--ram", "64", "--cache", str(tmp_path))
    before = report(*here)
    assert before["placement"]["attention"] == "16 bits"
    entries = tuple(Entry(name=name, ok=True, distance=0.01, ms=ms) for name, ms in TIMES.items())
    size = {"tokens": 30720, "keys": 30720, "heads": 40, "head_dim": 128, "dtype": "bfloat16"}
    store = open_store(tmp_path, "cuda:0")
    store.keep_attention(Attention(**size, date=today(), won="cudnn-fp8", entries=entries))
    found = report(*here)
    assert found["placement"]["attention"] == "cudnn-fp8"
    assert found["predicted"]["vram"]["denoise"] > before["predicted"]["vram"]["denoise"]
    assert found["predicted"]["seconds"]["denoise"] < before["predicted"]["seconds"]["denoise"]
    assert "cudnn-fp8, in 8 bits" in run(*here).stdout
    store.avoid("cudnn-fp8", "it was wrong")
    assert report(*here)["placement"]["attention"] == "16 bits"


def test_a_gpu_that_is_asked_for_must_be_here() -> None:
    assert run("--device", "cuda:77").exit_code == 5


def test_weights_that_are_there_are_read(tiny_checkpoint: Path) -> None:
    """The sizes of the files count; a directory without them falls back on the manifest."""
    found = report(
        "--model", str(tiny_checkpoint), "--height", "32", "--width", "48", "--frames", "5", "--device", "cpu"
    )
    assert found["placement"]["blocks"] == 2 and found["sizes_from"] == str(tiny_checkpoint)
    empty = report(
        "--profile", "rtx4070", "--ram", "16", "--weights", str(tiny_checkpoint.parent / "nothing")
    )
    assert empty["sizes_from"] == "manifest"


def test_the_demo_fits_everywhere() -> None:
    done = run("--model", "demo", "--device", "cpu", "--profile", "cpu")
    assert done.exit_code == 0 and "nothing streams" in done.stdout and "96x160x17" in done.stdout


def page(width: int | None, vram: float | None = None, profile: str = "rtx4070", **changes: Any) -> list[str]:
    card = load_profile(profile)
    machine = computer(vram_free=int(11.4 * GIB), **changes)
    made = plan_run(FP8, card, Job(720, 1280, 81), machine, "cuda:0", vram=vram)
    return as_text(made, Subject(FP8, card, machine, None), width)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = page(width)
    assert max(map(len, lines)) <= width
    bars = [line for line in lines if line.endswith("|")]
    assert len({len(line) for line in bars}) == (1 if bars else 0)  # the budget's end is one column
    assert (len(bars) == 4) == (width >= 80)


def test_a_bar_has_the_parts_of_its_phase_in_proportion() -> None:
    card = load_profile("rtx4070")
    machine = computer(vram_free=int(11.4 * GIB))
    made = plan_run(FP8, card, Job(720, 1280, 81), machine, "cuda:0")
    (line,) = [
        line for line in as_text(made, Subject(FP8, card, machine, None), 120) if line.startswith("denoise")
    ]
    bar = line.split("compute")[1].removeprefix("  ").removesuffix("|")
    parts, drawn = made.parts["denoise"], 0
    for name, nbytes in parts.items():
        exact = nbytes * len(bar) / made.budget.vram
        assert abs(bar.count(MARKS[name]) - exact) <= 1, name
        drawn += bar.count(MARKS[name])
    assert bar.count(" ") == len(bar) - drawn and drawn >= 0.9 * len(bar)


def test_every_mark_is_explained_and_predictions_are_called_so() -> None:
    text = "\n".join(page(120))
    assert text.startswith("Prediction for a video of 720x1280x81") and LEGEND.split(",")[0] in text
    assert all(f"{mark} " in LEGEND for mark in MARKS.values())
    assert "predicted (" in text and "disk 2.0 GB/s, assumed" in text
    measured = "\n".join(page(200, disk=3.2e9))
    assert "disk 3.2 GB/s, measured (made up)" in measured


def test_where_the_text_encoder_is_between_prompts() -> None:
    for arguments, words in (
        (("--profile", "rtx4070"), "its encoder is read from disk for each prompt"),
        (("--profile", "h200"), "its encoder stays on the GPU"),
        (
            ("--profile", "h200", "--vram", "16"),
            "its encoder stays in RAM once a prompt was read, up to 4.3 GiB of it pinned",
        ),
    ):
        assert words in run("--ram", "64", *arguments).stdout
    found = report("--ram", "64", "--profile", "h200", "--vram", "16")
    assert found["placement"]["text"] == "cached"
    assert found["predicted"]["pinned"] == 24 * 192937984 + 11 * 32 * 2**20


def test_a_pipe_gets_a_fixed_width() -> None:
    assert max(map(len, run("--profile", "h200", "--ram", "64").stdout.splitlines())) <= PIPE_WIDTH
