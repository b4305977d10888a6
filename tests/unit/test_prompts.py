"""Where prompts come from: arguments, files and pipes, in whatever form editors and shells leave them."""

import os
from pathlib import Path

import pytest

from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from runtime.request import MAX_PROMPT, Request
from runtime.video import Video, read_metadata
from tests.conftest import Run

FOX = "A red fox runs\nin the snow."


@pytest.fixture
def asked(t2v: Run, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Run:
    """`t2v generate ARGUMENTS` up to the point where the prompt reaches the engine: stdout is its repr."""

    class Reached(RequestError):
        pass

    def generate(request: Request, *_: object, **__: object) -> None:
        raise Reached(f"prompt={request.prompt!r}")

    monkeypatch.setattr("entrypoint.generate.generate", generate)

    def run(*arguments: object, **extra: object):  # type: ignore[no-untyped-def]
        return t2v("generate", "--model", tiny_checkpoint, *arguments, **extra)

    return run


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FOX.encode(), FOX),
        (b"\xef\xbb\xbf" + FOX.encode(), FOX),  # the mark of Windows editors
        (FOX.replace("\n", "\r\n").encode(), FOX),
        (FOX.replace("\n", "\r").encode(), FOX),
        ("Füchse im Schnee \u591c\u306e\u72d0 \U0001f98a".encode(), "Füchse im Schnee 夜の狐 🦊"),
        ("e\u0301".encode(), "e\u0301"),  # composed by the tokenizer's cleaning, not here
    ],
    ids=["plain", "BOM", "CRLF", "CR", "unicode", "decomposed"],
)
@pytest.mark.parametrize("pipe", [False, True], ids=["file", "stdin"])
def test_forms_of_a_text(asked: Run, workplace: Path, content: bytes, expected: str, pipe: bool) -> None:
    (workplace / "p.txt").write_bytes(content)
    result = asked("--prompt-file", "-", input=content) if pipe else asked("--prompt-file", "p.txt")
    assert f"prompt={expected!r}" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\xef\xbb\xbf\r\n \t\n", ["empty"]),
        (FOX.encode("utf-16"), ["not UTF-8", "save the prompt as UTF-8"]),
        (FOX.encode("utf-16-le"), ["NUL", "save the prompt as UTF-8"]),
        ("un caf\u00e9".encode("latin-1"), ["not UTF-8"]),
        (bytes(range(256)) * 40, ["not UTF-8"]),
        (b"a fox " * (1 << 20), [f"more than {MAX_PROMPT} characters"]),
        (b"a" * (MAX_PROMPT + 1), [f"more than {MAX_PROMPT} characters"]),
    ],
    ids=["empty", "blank", "utf-16", "utf-16-le", "latin-1", "binary", "huge", "one too many"],
)
@pytest.mark.parametrize("pipe", [False, True], ids=["file", "stdin"])
def test_what_is_no_prompt(t2v: Run, workplace: Path, content: bytes, words: list[str], pipe: bool) -> None:
    (workplace / "p.txt").write_bytes(content)
    given = ["--prompt-file", "-"] if pipe else ["--prompt-file", "p.txt"]
    result = t2v("--model", "demo", *given, input=content if pipe else None)
    assert result.exit_code == 2 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("t2v: error: ")]
    assert len(errors) == 1 and len(errors[0]) < 400
    assert all(word in errors[0] for word in words), errors


def test_a_source_without_end_is_not_read_to_its_end(t2v: Run) -> None:
    assert "NUL" in t2v("--model", "demo", "--prompt-file", "/dev/zero").stderr


def test_a_directory_and_nothing(t2v: Run, workplace: Path) -> None:
    for name in (".", "nowhere.txt"):
        result = t2v("--model", "demo", "--prompt-file", name)
        assert result.exit_code == 2 and repr(name) in result.stderr


def test_the_longest_prompt_that_may_be(asked: Run, workplace: Path) -> None:
    (workplace / "p.txt").write_text("a" * MAX_PROMPT)
    assert "prompt='aaa" in asked("--prompt-file", "p.txt").stderr


def test_lines_are_one_text_to_the_model(tiny_checkpoint: Path) -> None:
    pipe = Pipeline.load(model=tiny_checkpoint, device="cpu")
    assert pipe.tokenizer(FOX.replace("\n", "\r\n\r\n\t")) == pipe.tokenizer(" ".join(FOX.split()))


def test_an_argument_that_is_not_utf8(small: Run, workplace: Path) -> None:
    """A shell hands over bytes; those that are no text are replaced, and the run ends well."""
    prompt = os.fsdecode(b"A red fox \xff\xfe in the snow")
    result = small("--prompt", prompt, "--output", "fox.mp4", "--save-latents")
    assert result.exit_code == 0, result.output
    assert read_metadata("fox.mp4")["prompt"] == "A red fox \ufffd\ufffd in the snow"


def test_half_surrogates_survive_in_a_record(tmp_path: Path) -> None:
    """From Python nothing cleans the prompt, and a video is too late to fail."""
    import numpy as np

    frames = np.random.default_rng(3).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    path = Video(frames, 8, {"prompt": "fox \ud800 \udcff \x00"}).save(tmp_path / "fox.mp4")
    assert read_metadata(path) == {"prompt": "fox \ud800 \udcff \x00"}
