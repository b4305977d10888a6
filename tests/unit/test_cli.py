"""The program: verbs, options, environment, and what goes to stdout and to stderr."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml

from entrypoint.cli import cli
from entrypoint.events import Peak, Result
from entrypoint.options import DEFAULT_MODEL
from entrypoint.progress import summary
from runtime.profiles import DEFAULT_MODEL as ENGINES_DEFAULT
from runtime.profiles import list_manifests, list_profiles, load_manifest, load_profile, parse
from runtime.request import Request
from runtime.schema import Profile
from runtime.video import read_frames, read_metadata
from tests.conftest import Run
from tests.tiny import SMALL

GUITAR = "a-man-with-short-gray-hair-plays-a-red-electric-guitar-42.mp4"


def events(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_a_video_from_nothing_but_a_model(small: Run, workplace: Path) -> None:
    result = small()
    assert result.exit_code == 0, result.output
    assert result.stdout == f"outputs/{GUITAR}\n"
    frames = read_frames(workplace / "outputs" / GUITAR)
    assert frames.shape == (SMALL["frames"], SMALL["height"], SMALL["width"], 3)
    assert frames.std() > 1
    metadata = read_metadata(workplace / "outputs" / GUITAR)
    assert metadata["seed"] == 42 and metadata["steps"] == 4 and metadata["prompt"].startswith("A man with")


def test_people_are_told_the_phases_and_their_cost(small: Run) -> None:
    stderr = small("--seed", 7).stderr
    lines = stderr.splitlines()
    assert "48x32, 5 frames, seed 7" in lines[0] and "on cpu with profile cpu" in lines[0]
    assert [line.split(",")[0] for line in lines if line.startswith("denoise ")][:4] == [
        f"denoise {step}/4" for step in range(1, 5)
    ]
    table = lines[lines.index(next(line for line in lines if line.startswith("phase"))) :]
    assert [line.split("  ")[0] for line in table[1:7]] == [
        *("load weights", "read prompt", "denoise", "decode", "write video", "total")
    ]
    assert "peak RAM" in table[0] and "VRAM" not in table[0]


@pytest.mark.parametrize("variant", ["distill_models", "distill_fp8", "distill_int8"])
def test_every_published_layout_runs(small: Run, tiny_checkpoint: Path, variant: str) -> None:
    result = small("--output", "fox.mp4", "--prompt", "A red fox", model=tiny_checkpoint / variant)
    assert result.exit_code == 0, result.output
    assert read_frames("fox.mp4").std() > 1


def test_the_same_seed_gives_the_same_video_and_another_does_not(small: Run) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert small("--seed", seed, "--output", f"{name}.mp4").exit_code == 0
    a, b, c = (read_frames(f"{name}.mp4").astype(int) for name in "abc")
    assert np.array_equal(a, b)
    assert np.abs(a - c).mean() > 1


def test_json_events(small: Run, workplace: Path) -> None:
    result = small("--json", "--save-latents", "--contact-sheet", "--prompt", "A red zebra")
    assert result.exit_code == 0
    told = events(result.stdout)
    assert result.stderr == "t2v: warning: the model does not know: zebra; other words may serve better.\n"
    assert [event["event"] for event in told].count("result") == 1 and told[-1]["event"] == "result"
    assert [event for event in told if event["event"] == "warning"] == [
        {"event": "warning", "message": "the model does not know: zebra; other words may serve better."}
    ]
    stages = [event for event in told if event["event"] == "stage"]
    for stage in stages:
        assert set(stage) == {"event", "phase", "step", "steps", "seconds", "eta", "bytes"}
        assert 1 <= stage["step"] <= stage["steps"] and stage["seconds"] >= 0 and stage["bytes"] >= 0
        assert stage["eta"] is None or stage["eta"] >= 0
    phases = list(dict.fromkeys(stage["phase"] for stage in stages))
    assert phases == ["load", "text", "denoise", "decode", "save"]
    assert [(s["step"], s["steps"]) for s in stages if s["phase"] == "denoise"] == [
        (n, 4) for n in range(1, 5)
    ]
    assert [(s["step"], s["steps"]) for s in stages if s["phase"] == "decode"] == [(1, 2), (2, 2)]

    done = told[-1]
    expected = {"seed": 42, "width": 48, "height": 32, "frames": 5, "fps": 16}
    assert {key: done[key] for key in expected} == expected
    for key, suffix in (("path", ".mp4"), ("latents", ".latents.safetensors"), ("contact_sheet", ".png")):
        assert Path(done[key]) == workplace / "outputs" / f"a-red-zebra-42{suffix}"
        assert Path(done[key]).stat().st_size > 0
    assert list(done["timings"]) == phases == list(done["peak_memory"])
    assert done["seconds"] >= sum(done["timings"].values())
    for peak in done["peak_memory"].values():
        assert set(peak) == {"ram", "vram"} and peak["vram"] is None
        assert peak["ram"] > 10 << 20
    assert set(done) == {
        "event",
        *expected,
        "path",
        "latents",
        "contact_sheet",
        "model",
        "seconds",
        "timings",
        "peak_memory",
    }


def test_the_table_shows_what_there_is_to_show() -> None:
    peaks = {"denoise": Peak(3 << 30, 11 << 30), "save": Peak(4 << 30, 1 << 20)}
    result = Result(
        Path("x.mp4"), "demo", None, 832, 480, 81, 16, 99.0, {"denoise": 61.25, "save": 0.5}, peaks
    )
    text = [click.unstyle(line) for line in summary(result)]
    assert text == [
        "phase          time  peak RAM  peak VRAM",
        "denoise      61.2 s   3.0 GiB   11.0 GiB",
        "write video   0.5 s   4.0 GiB    1.0 MiB",
        "total        99.0 s   4.0 GiB   11.0 GiB",
        "",
        "832x480, 81 frames, 5.1 s at 16 fps; demo",
    ]


def test_json_names_no_file_that_was_not_written(small: Run) -> None:
    assert not {"latents", "contact_sheet"} & set(events(small("--json").stdout)[-1])


def test_options_come_from_the_environment(small: Run, t2v: Run, tiny_checkpoint: Path) -> None:
    environment = {
        "T2V_MODEL": str(tiny_checkpoint),
        "T2V_PROFILE": "cpu",
        "T2V_HEIGHT": "32",
        "T2V_WIDTH": "64",
        "T2V_FRAMES": "1",
        "T2V_SEED": "11",
        "T2V_PROMPT": "A red fox",
        "T2V_OUTPUT": "here/fox.mp4",
        "T2V_JSON": "1",
        "T2V_DEBUG": "",  # as compose passes a variable that is not set: no setting at all
        "T2V_GUIDANCE": "",
        "T2V_ACCEPT_NONSTANDARD": "",
        "T2V_VERSION": "0.1.0",  # of an image, not ours
    }
    result = t2v("--width", 48, env=environment)  # the command line wins
    assert result.exit_code == 0, result.output
    done = events(result.stdout)[-1]
    assert (done["width"], done["height"], done["frames"], done["seed"]) == (48, 32, 1, 11)
    assert Path(done["path"]).parts[-2:] == ("here", "fox.mp4")
    assert t2v("profiles", "cpu", env=environment).stdout.startswith("{")


def test_a_bad_setting_is_told_as_such(t2v: Run) -> None:
    result = t2v(env={"T2V_SEED": "many"})
    assert result.exit_code == 2 and "many" in result.stderr and "T2V_SEED" in result.stderr


def test_prompts_from_files_and_pipes(small: Run, workplace: Path) -> None:
    (workplace / "fox.txt").write_text("A red fox\n", encoding="utf-8")
    assert small("--prompt-file", "fox.txt").stdout == "outputs/a-red-fox-42.mp4\n"
    assert small("--prompt-file", "-", input="The snow").stdout == "outputs/the-snow-42.mp4\n"
    given = small("--prompt-file", "fox.txt", env={"T2V_PROMPT": "The guitar"})  # the command line wins
    assert given.stdout == "outputs/a-red-fox-42-2.mp4\n"
    both = small("--prompt-file", "fox.txt", "--prompt", "A man")
    assert both.exit_code == 2 and "leave one out" in both.stderr
    (workplace / "latin.txt").write_bytes("café".encode("latin-1"))
    latin = small("--prompt-file", "latin.txt")
    assert latin.exit_code == 2 and "latin.txt is not UTF-8" in latin.stderr


def test_an_option_first_means_generate(t2v: Run) -> None:
    assert "height is 481" in t2v("--model", "demo", "--height", 481).stderr
    assert t2v("--seed", 1, "--help").stdout == t2v("generate", "--help").stdout
    assert "Commands:" in t2v("--help").stdout


def test_help_shows_every_option_with_its_variable(t2v: Run) -> None:
    for verb in cli.commands:
        text = t2v(verb, "--help").stdout
        for parameter in cli.commands[verb].params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in text and f"T2V_{parameter.name}".upper() in text.replace("\n", "")
    assert {field.name for field in fields(Request)} <= {p.name for p in cli.commands["generate"].params}


def test_the_default_model_is_the_engines() -> None:
    assert DEFAULT_MODEL == ENGINES_DEFAULT


def test_profiles(t2v: Run) -> None:
    table = t2v("profiles").stdout.splitlines()
    assert [line.split()[0] for line in table[1:]] == list_profiles()
    where = table[0].index("WEIGHTS")
    assert {line[where:].split()[0] for line in table[1:]} <= {"fp8", "int8", "bf16"}
    listed = events(t2v("profiles", "--json").stdout)
    assert [Profile.model_validate(one) for one in listed] == [load_profile(name) for name in list_profiles()]
    shown = t2v("profiles", "rtx4070").stdout
    assert parse(Profile, shown, "stdout") == load_profile("rtx4070")  # a start for a profile of one's own


def test_models(t2v: Run) -> None:
    table = t2v("models").stdout.splitlines()
    assert [line.split()[0] for line in table[1:]] == list_manifests()
    assert [one["name"] for one in events(t2v("models", "--json").stdout)] == list_manifests()
    assert yaml.safe_load(t2v("models", "demo").stdout) == load_manifest("demo").model_dump(mode="json")
    family = yaml.safe_load(t2v("models", DEFAULT_MODEL).stdout)
    assert family["family"] == DEFAULT_MODEL


def test_version(t2v: Run) -> None:
    name, number = t2v("--version").stdout.split()
    assert name == "t2v" and number[0].isdigit()
