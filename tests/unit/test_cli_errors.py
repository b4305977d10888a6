"""What goes wrong, as the user meets it: a sentence, the right exit code, no traceback, no lost latents."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from entrypoint.latents import read_latents
from runtime import frames
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.errors import DeviceError, OutOfMemoryError, PlanError
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.sampler import schedule
from runtime.transformer import Transformer
from runtime.video import read_frames
from tests.conftest import Run


def told(result: Result, code: int, *words: str) -> str:
    """The one error line of a failed run, which must hold `words`; nothing went to stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("t2v: error: ")]
    assert len(lines) == 1, result.stderr
    assert len(lines[0]) < 700
    for word in words:
        assert word in lines[0]
    return lines[0]


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height", "481"], ["height is 481", "480 or 496"]),
        (["--width", "0"], ["width is 0", "Nearest: 16"]),
        (["--frames", "80"], ["frames is 80", "77 or 81"]),
        (["--frames", "-3"], ["frames is -3", "Nearest: 1."]),
        (["--prompt", ""], ["empty", "--prompt"]),
        (["--prompt", " \n "], ["empty"]),
        (["--steps", "8"], ["steps is 8", "exactly 4", "--accept-nonstandard"]),
        (["--guidance", "5"], ["guidance is 5", "distilled"]),
        (["--negative-prompt", "ugly"], ["no effect"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--fps", "0"], ["fps is 0"]),
        (["--profile", "rtx4o70"], ["rtx4o70", "rtx4070", "t2v profiles"]),
        (["--profile", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--model", "demo-fp9"], ["demo-fp9", "demo-fp8", "t2v models"]),
        (["--model", "no/such/weights"], ["no/such/weights"]),
        (["--device", "mps"], ["mps", "cuda:N"]),
        (["--sampler", "ddim"], ["ddim", "lcm"]),
        (["--device", "cpu", "--noise-device", "cuda"], ["--noise-device", "CPU"]),
        (["--heigth", "480"], ["--heigth", "--height"]),
        (["--seed", "abc"], ["abc", "integer"]),
        (["--prompt-file", "nowhere.txt"], ["nowhere.txt"]),
        (["--output", "fox.avi"], ["fox.avi", ".mp4"]),
        (["--output", "/proc/fox.mp4"], ["/proc/fox.mp4"]),
        (["--output", "file/below/fox.mp4"], ["file", "is a file"]),
        (["--output", "there.mp4"], ["there.mp4", "--overwrite"]),
        (["--output", "x" * 300 + ".mp4"], ["File name too long"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_arguments(
    t2v: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    (workplace / "file").write_text("not a directory")
    (workplace / "there.mp4").write_bytes(b"precious")
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    told(t2v("--model", "demo", *arguments), 2, *words)
    assert (workplace / "there.mp4").read_bytes() == b"precious"
    assert sorted(path.name for path in workplace.iterdir()) == ["file", "there.mp4"]


def test_a_verb_that_is_none(t2v: Run) -> None:
    told(t2v("A red fox"), 2, "--prompt 'A red fox'", "generate")


def test_a_missing_weights_directory(t2v: Run) -> None:
    told(t2v("--weights", "/nowhere/at/all"), 3, "/nowhere/at/all", "--weights", "--model demo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "arguments", [["--device", "cuda"], ["--device", "cuda:1"], ["--profile", "rtx4070"]]
)
def test_cuda_asked_and_absent(t2v: Run, tiny_checkpoint: Path, arguments: list[str]) -> None:
    told(t2v("--model", tiny_checkpoint, *arguments), 5, "needs CUDA", "--device cpu")


def test_errors_are_events_with_json(t2v: Run) -> None:
    for arguments, kind in (
        (["--model", "demo", "--height", "7"], "RequestError"),
        (["--no-such"], "UsageError"),
    ):
        result = t2v(*arguments, "--json")
        event = json.loads(result.stdout)
        assert {key: event[key] for key in ("event", "code", "kind")} == {
            "event": "error",
            "code": 2,
            "kind": kind,
        }
        assert event["message"] in result.stderr
        assert set(event) == {"event", "code", "kind", "message"}


def test_a_long_prompt_is_told_and_runs(small: Run) -> None:
    result = small("--prompt", "a red fox " * 300, "--output", "fox.mp4")
    assert result.exit_code == 0
    assert "t2v: warning: the prompt has 901 tokens and the model reads 512" in result.stderr


def test_a_prompt_is_cut_to_what_the_transformer_reads(small: Run, weights: Path) -> None:
    config = weights / "distill_models/config.json"
    config.write_text(config.read_text().replace("512", "16"))
    result = small("--prompt", "a red fox " * 20, "--output", "fox.mp4", model=weights)
    assert result.exit_code == 0 and "has 61 tokens and the model reads 16" in result.stderr


# -------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def weights(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's bf16 variant, to be broken."""
    root = tmp_path / "weights"
    shutil.copytree(tiny_checkpoint / "distill_models", root / "distill_models")
    shutil.copytree(tiny_checkpoint / "google", root / "google")
    return root


TRANSFORMER = "distill_models/distill_model.safetensors"
TEXT_ENCODER = "distill_models/models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "distill_models/Wan2.1_VAE.pth"
TOKENIZER = "google/umt5-xxl/tokenizer.json"


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE_FILE, TOKENIZER])
def test_missing_weights(small: Run, weights: Path, file: str) -> None:
    (weights / file).unlink()
    told(small(model=weights), 3, Path(file).name)


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE_FILE])
def test_truncated_weights(small: Run, weights: Path, file: str) -> None:
    whole = (weights / file).read_bytes()
    (weights / file).write_bytes(whole[: len(whole) // 2])
    told(small(model=weights), 3, Path(file).name, "truncated")


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE_FILE, TOKENIZER])
def test_corrupt_weights(small: Run, weights: Path, file: str) -> None:
    content = bytearray((weights / file).read_bytes())
    for i in range(8, 200):
        content[i] ^= 0x5A
    (weights / file).write_bytes(content)
    told(small(model=weights), 3, Path(file).name)


def test_a_tensor_of_the_wrong_type(small: Run, weights: Path) -> None:
    tensors = load_file(weights / TRANSFORMER)
    name = "blocks.1.ffn.2.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, weights / TRANSFORMER)
    told(small(model=weights), 3, "distill_model.safetensors", name, "int32")


def test_a_tensor_too_few(small: Run, weights: Path) -> None:
    tensors = load_file(weights / TRANSFORMER)
    del tensors["blocks.0.cross_attn.norm_k.weight"]
    save_file(tensors, weights / TRANSFORMER)
    told(small(model=weights), 3, "blocks.0.cross_attn.norm_k.weight")


def test_weights_of_another_family(small: Run, weights: Path) -> None:
    shutil.copy(weights / VAE_FILE, weights / TEXT_ENCODER)
    told(small(model=weights), 3, Path(TEXT_ENCODER).name, "VAE", "umT5")


def test_fp8_weights_in_the_place_of_bf16(small: Run, weights: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(weights / TRANSFORMER).items()}
    write_layout(weights / TRANSFORMER, tensors, Recipe("transformer", "fp8"), "single")
    told(small(model=weights), 3, "distill_model.safetensors", "fp8", "bf16")


# ------------------------------------------------------------------------------- what the engine meets later


def latents_of(result: Result) -> Path:
    """Where the error says that the latents are."""
    line = next(line for line in result.stderr.splitlines() if " kept" in line)
    return Path(line.split("t2v resume ")[1])


@pytest.fixture
def expected_latents(tiny_checkpoint: Path) -> list[torch.Tensor]:
    """The latents of the default request after each step, from the engine itself."""
    pipe = Pipeline.load(model=tiny_checkpoint, device="cpu")
    stages = pipe.stages(Request(height=32, width=48, frames=5))
    return [stage.latents for stage in stages if stage.latents is not None]


def spoil_step(monkeypatch: pytest.MonkeyPatch, spoiled: int, spoil: Any) -> None:
    """Have the transformer's answers from step `spoiled` on, however often, made by spoil(latents, sigma)."""
    honest, calls = Transformer.velocity, iter(range(1, 1000))

    def velocity(self: Transformer, latents: Any, condition: Any) -> Any:
        answer = honest(self, latents, condition)
        step = next(calls)
        return spoil(latents, schedule()[spoiled - 1]) if step >= spoiled else answer

    monkeypatch.setattr(Transformer, "velocity", velocity)


def nan(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.full_like(latents, torch.nan)


def dead(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    return latents / sigma  # so that x - sigma v is zero


def test_latents_that_are_not_finite_at_once(
    small: Run, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    spoil_step(monkeypatch, 1, nan)
    result = small("--output", "fox.mp4")
    told(result, 6, "not finite", "step 1 of 4")
    assert "the run is kept; to go on with it: t2v resume fox.run.safetensors" in result.stderr
    assert [path.name for path in workplace.iterdir()] == ["fox.run.safetensors"]


@pytest.mark.parametrize(("spoil", "step", "word"), [(nan, 3, "not finite"), (dead, 4, "flat")])
def test_the_last_good_latents_are_kept(
    small: Run,
    monkeypatch: pytest.MonkeyPatch,
    expected_latents: list[torch.Tensor],
    spoil: Any,
    step: int,
    word: str,
) -> None:
    spoil_step(monkeypatch, step, spoil)
    result = small()
    told(result, 6, word, f"step {step} of 4")
    kept = read_latents(latents_of(result))
    assert (kept.step, kept.steps) == (step - 1, 4)
    assert torch.equal(kept.latents, expected_latents[step - 2])
    assert f"after step {step - 1} of 4" in result.stderr


def spoil_frames(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    honest = frames.decode_pieces

    def pieces(*args: Any) -> Iterator[Any]:
        return (piece._replace(frames=torch.full_like(piece.frames, value)) for piece in honest(*args))

    monkeypatch.setattr(frames, "decode_pieces", pieces)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), ["not finite"]), (0.25, ["flat colour"])])
def test_broken_frames_keep_the_latents(
    small: Run,
    t2v: Run,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    expected_latents: list[torch.Tensor],
    value: float,
    words: list[str],
) -> None:
    with monkeypatch.context() as broken:
        spoil_frames(broken, value)
        result = small("--output", "my videos/fox.mp4")
        told(result, 6, *words)
    path = Path("my videos/fox.run.safetensors")
    assert f"t2v resume '{path}'" in result.stderr  # as a shell needs it
    kept = read_latents(path)
    assert torch.equal(kept.latents, expected_latents[-1]) and kept.step == kept.steps == 4
    assert not Path("my videos/fox.mp4").exists()

    # It names the model by itself, to the two verbs that make a video of it.
    decoded = t2v("decode", path, "--device", "cpu", "--output", "fox.mp4")
    assert decoded.exit_code == 0, decoded.output
    assert t2v("resume", path).stdout == "my videos/fox.mp4\n"
    assert small("--output", "again.mp4").exit_code == 0
    for made in ("fox.mp4", "my videos/fox.mp4"):
        assert (read_frames(made) == read_frames("again.mp4")).all()


def test_json_tells_where_the_latents_are(small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_frames(monkeypatch, 0.0)
    last = json.loads(small("--json", "--output", "fox.mp4").stdout.splitlines()[-1])
    assert last["event"] == "error" and last["code"] == 6 and last["kind"] == "OutputCheckError"
    assert last["latents"] == last["run_file"] == str(Path("fox.run.safetensors").absolute())
    assert read_latents(Path(last["latents"])).seed == 42


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            "CUDA out of memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), "CUBLAS_STATUS_ALLOC"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
            "CPUAlloc",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_out_of_memory_when_there_is_no_leaner_way(
    small: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def velocity(*_: object) -> None:
        raise error

    monkeypatch.setattr(Transformer, "velocity", velocity)
    result = small("--output", "fox.mp4")
    told(result, OutOfMemoryError.exit_code, "emory ran out", reason, "--frames", "--height")
    assert "t2v resume fox.run.safetensors" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    ],
)
def test_a_failing_gpu(small: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def velocity(*_: object) -> None:
        raise error

    monkeypatch.setattr(Transformer, "velocity", velocity)
    told(small(), 5, str(error).splitlines()[0], "nvidia-smi")


def test_out_of_memory_in_the_decode_keeps_the_latents(
    small: Run, monkeypatch: pytest.MonkeyPatch, expected_latents: list[torch.Tensor]
) -> None:
    def pieces(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(frames, "decode_pieces", pieces)
    result = small()
    told(result, 7, "emory ran out", "decode")
    assert torch.equal(read_latents(latents_of(result)).latents, expected_latents[-1])


@pytest.mark.parametrize("error", [PlanError("needs 9 GB, has 8."), DeviceError("the driver is gone.")])
def test_exit_codes_are_those_of_the_errors(small: Run, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "load", load)
    told(small(), error.exit_code, str(error))


def test_a_bug_is_a_sentence_and_with_debug_a_traceback(small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyError("blocks.7")

    monkeypatch.setattr(Pipeline, "load", load)
    told(small(), 1, "KeyError: 'blocks.7'", "--debug")


def test_a_wrong_size_is_told_before_missing_weights(t2v: Run) -> None:
    result = t2v(
        "--model", "wan2.1-t2v-14b-4step-fp8", "--device", "cpu", "--height", 100, "--weights", "nowhere"
    )
    assert result.exit_code == 2
    assert "height is 100" in result.stderr and "96 or 112" in result.stderr
    result = t2v(
        "--model", "wan2.1-t2v-14b-4step-fp8", "--device", "cpu", "--height", 96, "--weights", "nowhere"
    )
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("typed", "meant"), [("wan", "wan2.1-t2v-14b"), ("dmeo", "demo"), ("Demo-FP8", "demo-fp8")]
)
def test_near_models_are_listed(t2v: Run, typed: str, meant: str) -> None:
    result = t2v("--model", typed)
    assert result.exit_code == 2 and meant in result.stderr
