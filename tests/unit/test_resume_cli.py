"""`t2v resume`: what a run leaves, what goes on from it, and what is refused."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import runtime.frames
from entrypoint.latents import latents_metadata, read_latents, save_latents
from entrypoint.run_file import RunFile, in_use, read_run
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.errors import RequestError, WeightsError
from runtime.transformer import Transformer
from runtime.video import read_frames, read_metadata
from tests.conftest import Run
from tests.tiny import PROMPTS

FOX = ("--prompt", PROMPTS[1], "--seed", 5)
RUN = "fox.run.safetensors"


def ends_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Have the transformer raise `error` in its forward number `step` and from then on."""
    honest, calls = Transformer.velocity, iter(range(1, 1000))

    def velocity(self: Transformer, *args: Any) -> Any:
        if next(calls) >= step:
            raise error
        return honest(self, *args)

    monkeypatch.setattr(Transformer, "velocity", velocity)


def ends_in_decode(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def frames(*_: object) -> None:
        raise error

    monkeypatch.setattr(runtime.frames, "decode_pieces", frames)


@pytest.fixture
def left(small: Run, workplace: Path) -> Any:
    """left(step, error, *arguments): run until `step`, where `error` ends it (5: the decode)."""

    def run(step: int, error: BaseException | None = None, *arguments: object) -> Any:
        with pytest.MonkeyPatch.context() as broken:
            error = KeyboardInterrupt() if error is None else error
            if step == 5:
                ends_in_decode(broken, error)
            else:
                ends_at(broken, step, error)
            return small(*FOX, "--output", "fox.mp4", *arguments)

    return run


_made: list[bytes] = []


@pytest.fixture
def expected(small: Run, workplace: Path) -> Any:
    """The frames of the same run without an end, made elsewhere; made once."""
    path = Path("expected/fox.mp4")
    if _made:
        path.parent.mkdir()
        path.write_bytes(_made[0])
    else:
        result = small(*FOX, "--output", path)
        assert result.exit_code == 0, result.output
        _made.append(path.read_bytes())
    return read_frames(path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (WeightsError("block_1.safetensors ends early."), 3),
        (MemoryError(), 7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_run_it_goes_on(
    left: Any, t2v: Run, expected: Any, workplace: Path, error: BaseException, code: int
) -> None:
    result = left(3, error)
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last == f"t2v: the run is kept after step 2 of 4; to go on with it: t2v resume {RUN}"
    assert sorted(path.name for path in workplace.iterdir()) == ["expected", RUN]
    resumed = t2v("resume", RUN)
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout == "fox.mp4\n"
    assert "denoise 3/4" in resumed.stderr and "denoise 2/4" not in resumed.stderr
    assert (read_frames("fox.mp4") == expected).all()
    assert sorted(path.name for path in workplace.iterdir()) == ["expected", "fox.mp4"]
    ours, theirs = read_metadata("fox.mp4"), read_metadata("expected/fox.mp4")
    assert ours.pop("resumed_after_step") == 2
    different = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert different <= {"timings", "text_states", "plan"}


@pytest.mark.parametrize("step", [1, 5])
def test_from_text_step_or_decode(
    left: Any, t2v: Run, expected: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    result = left(step, None, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0] == {"event": "run", "run_file": str(Path(RUN).absolute())}
    assert events[-1]["run_file"] == str(Path(RUN).absolute())
    assert ("latents" in events[-1]) == (step == 5)
    resumed = t2v("resume", RUN, "--json", "--contact-sheet")
    assert resumed.exit_code == 0, resumed.output
    events = [json.loads(line) for line in resumed.stdout.splitlines()]
    assert events[0]["event"] == "run" and events[-1]["event"] == "result"
    steps = [event["step"] for event in events if event.get("phase") == "denoise"]
    assert steps == list(range(step, 5))
    assert Path(events[-1]["contact_sheet"]).exists()
    assert (read_frames("fox.mp4") == expected).all()
    if step == 5:  # the record is whole, although its run was not
        repeated = t2v("rerun", "fox.mp4")
        assert repeated.exit_code == 0 and (read_frames("fox-rerun.mp4") == expected).all()


def test_ended_while_loading(small: Run, t2v: Run, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import loading

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(loading, "load_vae", interrupted)
        result = small(*FOX, "--output", "fox.mp4")
    assert result.exit_code == 130 and f"the run is kept; to go on with it: t2v resume {RUN}" in result.stderr
    decoded = t2v("decode", RUN)
    assert decoded.exit_code == 2 and "no latents yet" in decoded.stderr and "t2v resume" in decoded.stderr
    assert t2v("resume", RUN).exit_code == 0
    assert (read_frames("fox.mp4") == expected).all()


def test_a_run_that_could_not_begin_leaves_nothing(small: Run, workplace: Path) -> None:
    from runtime import loading

    for error, code in ((WeightsError("a fault"), 3), (KeyError("a bug"), 1)):

        def broken(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "load_vae", broken)
            result = small(*FOX, "--output", "fox.mp4")
        assert result.exit_code == code and "resume" not in result.stderr
        assert not list(workplace.iterdir())


def test_interrupted_again_and_again(left: Any, t2v: Run, expected: Any) -> None:
    left(2)
    for done in (2, 3):  # each process does one step more
        with pytest.MonkeyPatch.context() as broken:
            ends_at(broken, 2, KeyboardInterrupt())
            result = t2v("resume", RUN)
        assert result.exit_code == 130 and f"after step {done} of 4" in result.stderr
    assert t2v("resume", RUN).exit_code == 0
    assert (read_frames("fox.mp4") == expected).all()


# ------------------------------------------------------------------------------------ options, names, places


def test_options_of_the_run_are_kept(left: Any, t2v: Run, workplace: Path) -> None:
    left(2, None, "--save-latents", "--contact-sheet", "--fps", 9, "--sampler", "euler")
    standing = {"T2V_MODEL": "demo", "T2V_WEIGHTS": "/nowhere", "T2V_OUTPUT": "other.mp4", "T2V_SEED": "9"}
    assert t2v("resume", RUN, env=standing).stdout == "fox.mp4\n"  # those of the machine do not change it
    names = sorted(path.name for path in workplace.iterdir())
    assert names == ["fox.latents.safetensors", "fox.mp4", "fox.png"]
    record = read_metadata("fox.mp4")
    assert (record["fps"], record["sampler"], record["seed"]) == (9, "euler", 5)
    assert read_latents(Path("fox.latents.safetensors")).step == 4


def test_a_taken_name_gets_a_number(left: Any, t2v: Run, workplace: Path) -> None:
    left(2)
    Path("fox.mp4").write_bytes(b"precious")
    assert t2v("resume", RUN).stdout == "fox-2.mp4\n"
    assert Path("fox.mp4").read_bytes() == b"precious"
    left(2, None, "--overwrite")
    assert t2v("resume", RUN).stdout == "fox.mp4\n"
    assert len(read_frames("fox.mp4")) == 5


def test_another_output(left: Any, t2v: Run, workplace: Path) -> None:
    left(2)
    Path("there.mp4").write_bytes(b"precious")
    refused = t2v("resume", RUN, "--output", "there.mp4")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr and Path(RUN).exists()
    (workplace / "videos").mkdir()
    assert t2v("resume", RUN, "--output", "videos").stdout == "videos/fox.mp4\n"


def test_a_run_file_that_moved_takes_its_video_along(left: Any, t2v: Run, expected: Any) -> None:
    """As from a container, where it lay in /outputs, to its host; a file from anywhere replaces nothing."""
    left(2, None, "--overwrite")
    Path("elsewhere").mkdir()
    Path("fox.mp4").write_bytes(b"precious")
    Path(RUN).rename("elsewhere/b.run.safetensors")
    assert t2v("resume", "elsewhere/b.run.safetensors").stdout == "elsewhere/fox.mp4\n"
    assert (read_frames("elsewhere/fox.mp4") == expected).all()
    assert Path("fox.mp4").read_bytes() == b"precious"


def test_two_runs_of_one_name_keep_apart(left: Any, small: Run, t2v: Run, workplace: Path) -> None:
    left(2)
    before = Path(RUN).read_bytes()
    left(3)
    assert Path(RUN).read_bytes() == before
    names = sorted(path.name for path in workplace.iterdir())
    assert names == ["fox-2.run.safetensors", RUN]
    done = t2v("resume", ".")
    assert done.exit_code == 0 and done.stdout == "fox.mp4\nfox-2.mp4\n"
    assert (read_frames("fox.mp4") == read_frames("fox-2.mp4")).all()
    nothing = t2v("resume", ".")
    assert nothing.exit_code == 0 and "no run to go on with" in nothing.stderr


def test_of_many_one_that_fails_does_not_stop_the_others(left: Any, t2v: Run, workplace: Path) -> None:
    left(2)
    Path(RUN).rename("b.run.safetensors")
    (workplace / "a.run.safetensors").write_bytes(b"damaged")
    os.utime("a.run.safetensors", (1, 1))
    (workplace / "c.run.safetensors").touch()
    result = t2v("resume", ".", "--json")
    assert result.exit_code == 2
    ends = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in ends if event["event"] in ("error", "result")] == ["error", "result"]
    assert "a.run.safetensors" in result.stderr and "c.run.safetensors is empty" in result.stderr


# -------------------------------------------------------------------------------------------- what is refused


def test_other_weights_are_refused(left: Any, t2v: Run, tiny_checkpoint: Path, expected: Any) -> None:
    left(2)
    other = ("--model", tiny_checkpoint / "distill_fp8")
    refused = t2v("resume", RUN, *other)
    assert refused.exit_code == 2 and "not those" in refused.stderr and "--force" in refused.stderr
    assert "block" in refused.stderr and refused.stdout == ""
    gone = t2v("resume", RUN, "--model", "no/such/directory")
    assert gone.exit_code == 2 and "no/such/directory" in gone.stderr
    assert Path(RUN).exists() and not in_use(Path(RUN))
    forced = t2v("resume", RUN, *other, "--force")
    assert forced.exit_code == 0 and "quantization was" in forced.stderr, forced.output
    assert not (read_frames("fox.mp4") == expected).all()


def test_the_decode_asks_for_the_same_vae_alone(
    left: Any, t2v: Run, small: Run, tiny_checkpoint: Path, tmp_path: Path, expected: Any
) -> None:
    left(5)
    model = tmp_path / "vae-alone"
    model.mkdir()
    vae = model / "Wan2.1_VAE.pth"
    vae.symlink_to(tiny_checkpoint / "distill_models/Wan2.1_VAE.pth")
    assert t2v("resume", RUN, "--model", model).exit_code == 0
    assert (read_frames("fox.mp4") == expected).all()
    left(5, None, "--overwrite")
    vae.unlink()
    state = {name: tensor * 1.01 for name, tensor in vae_state(tiny_checkpoint).items()}
    write_layout(vae, state, Recipe("vae", "fp32", other_dtype=torch.float32), "pickle")
    refused = t2v("resume", RUN, "--model", model)
    assert refused.exit_code == 2 and "Wan2.1_VAE.pth" in refused.stderr


def vae_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "distill_models/Wan2.1_VAE.pth", weights_only=True)


def test_a_run_that_is_working_is_left_alone(left: Any, t2v: Run) -> None:
    left(2)
    working = RunFile.take_over(Path(RUN))
    assert in_use(Path(RUN))
    refused = t2v("resume", RUN)
    assert refused.exit_code == 2 and "is working" in refused.stderr
    skipped = t2v("resume", ".")
    assert skipped.exit_code == 0 and "is left to it" in skipped.stderr
    assert working.point is not None
    working.take(working.point)  # the lock stays with the name when the file is replaced
    assert in_use(Path(RUN))
    working.release()
    assert not in_use(Path(RUN)) and t2v("resume", RUN).exit_code == 0


def test_decode_reads_a_run_file(left: Any, t2v: Run, expected: Any) -> None:
    left(5)
    before = Path(RUN).read_bytes()
    assert t2v("decode", RUN, "--output", "decoded.mp4").exit_code == 0
    assert (read_frames("decoded.mp4") == expected).all()
    assert t2v("decode", RUN).stdout == "outputs/fox.mp4\n"
    assert Path(RUN).read_bytes() == before


def test_a_prompt_without_utf8_is_kept(tmp_path: Path) -> None:
    record = {"prompt": "fox \udc80", "seed": 1, "fps": 16, "sampler": "lcm", "steps": 4}
    metadata = latents_metadata(record, "demo", 2)
    save_latents(torch.randn(16, 1, 4, 6), tmp_path / "x.safetensors", metadata)
    kept = read_latents(tmp_path / "x.safetensors")
    assert kept.prompt == "fox \\udc80" and (kept.step, kept.steps, kept.seed) == (2, 4, 1)


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def lies(run: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    record = run["record"]
    yield run | {"version": 2}, "version 2"
    yield run | {"version": None}, "it was not written by this program"
    yield run | {"model": None}, "model None"
    yield run | {"output": 7}, "output 7"
    yield run | {"overwrite": "yes"}, "overwrite 'yes'"
    yield run | {"vram": -1}, "vram -1"
    yield run | {"record": []}, "record []"
    yield run | {"record": {}}, "does not say its prompt"
    yield run | {"record": record | {"height": "480"}}, "height '480'"
    yield run | {"record": record | {"height": 481}}, "height is 481"
    yield run | {"record": record | {"steps": 2**70}}, "steps"
    yield run | {"record": record | {"files": [1]}}, "files [1]"
    yield run | {"model": "/nowhere/at/all"}, "/nowhere/at/all"
    yield run | {"output": "/proc/fox.avi", "beside": False}, ".avi"


def test_run_files_that_lie(left: Any, t2v: Run, workplace: Path) -> None:
    left(3)
    tensors, metadata = parts(Path(RUN))
    run = json.loads(metadata["run"])
    bad = Path("bad.run.safetensors")

    def told(said: str) -> None:
        result = t2v("resume", bad)
        assert result.exit_code == 2 and result.stdout == "", result.output
        (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
        assert said in line and len(line) < 500

    for lie, said in lies(run):
        save_file(tensors, bad, metadata | {"run": json.dumps(lie)})
        told(said)
    for change, said in (
        ({"format": "t2v-latents"}, "is no run file"),
        ({"run": "{"}, "it was not written by this program"),
        ({"step": "9"}, "step '9'"),
        ({"step": "-1"}, "step '-1'"),
        ({"step": "4"}, "shape"),
    ):
        save_file(tensors, bad, metadata | change)
        if change != {"step": "4"}:
            told(said)
    for name, tensor, said in (
        ("latents", tensors["latents"][:, :1].contiguous(), "belong to another run"),
        ("latents", tensors["latents"] / 0, "not finite"),
        ("latents", tensors["latents"].int(), "not finite"),
        ("text_states", tensors["text_states"][:3].contiguous(), "belong to another run"),
        ("generator_state", tensors["generator_state"][:9].contiguous(), "another run"),
        ("generator_state", tensors["latents"].clone(), "latents"),
    ):
        save_file(tensors | {name: tensor}, bad, metadata)
        told(said)
    for content in (b"", b"not tensors", Path(RUN).read_bytes()[:500]):
        bad.write_bytes(content)
        told("bad.run.safetensors")
    with pytest.raises(RequestError):
        read_run(workplace / "absent.run.safetensors")
