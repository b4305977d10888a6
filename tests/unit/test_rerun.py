"""`t2v rerun`: the same video from its own record, what differs told first, and records that are lies."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from entrypoint.rerun import read_record
from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from runtime.video import RECORD_FORMAT, Video, read_frames, read_metadata
from tests.conftest import Run

PROMPT = "A red fox runs\nin the snow."


def packets(path: str | Path) -> list[bytes]:
    """The coded pictures of a video, without its record."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0)]


def told(stderr: str) -> list[str]:
    return [line.removeprefix("t2v: warning: ") for line in stderr.splitlines() if "warning: " in line]


def rewrite(path: Path, record: Any) -> Path:
    """A video with `record` in its comment, as JSON unless it is text already."""
    frames = np.random.default_rng(9).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    Video(frames, 8).save(path, overwrite=True)
    comment = record if isinstance(record, str) else json.dumps(record)
    changed = path.with_name(f"changed-{path.name}")
    with av.open(str(path)) as source, av.open(str(changed), "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.metadata["comment"] = comment
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return changed


_made: list[bytes] = []


@pytest.fixture
def fox(small: Run, workplace: Path) -> Path:
    """A video of the tiny model, every option unlike its default; made once."""
    if _made:
        (workplace / "videos").mkdir()
        (workplace / "videos/fox.mp4").write_bytes(_made[0])
        return Path("videos/fox.mp4")
    options = ("--seed", 7, "--fps", 9, "--steps", 3, "--sampler", "euler", "--accept-nonstandard")
    result = small("--prompt", PROMPT, *options, "--output", "videos/fox.mp4")
    assert result.exit_code == 0, result.output
    _made.append(Path("videos/fox.mp4").read_bytes())
    return Path("videos/fox.mp4")


def test_the_same_setting_gives_the_same_frames(t2v: Run, fox: Path) -> None:
    result = t2v("rerun", fox)
    assert result.exit_code == 0, result.output
    assert result.stdout == "videos/fox-rerun.mp4\n"
    assert told(result.stderr) == []
    assert np.array_equal(read_frames(fox), read_frames("videos/fox-rerun.mp4"))
    assert packets(fox) == packets("videos/fox-rerun.mp4")
    first, second = read_metadata(fox), read_metadata("videos/fox-rerun.mp4")
    assert {key for key in first | second if first.get(key) != second.get(key)} <= {
        "timings",
        "text_states",
        "plan",
    }
    assert first["prompt"] == PROMPT and first["steps"] == 3 and first["format"] == RECORD_FORMAT


def test_it_is_the_record_that_is_repeated(t2v: Run, fox: Path) -> None:
    """Another seed in the record is another video: nothing comes from the frames."""
    record = read_metadata(fox) | {"seed": 8}
    changed = rewrite(Path("other.mp4"), record)
    assert t2v("rerun", changed, "--output", "again.mp4").exit_code == 0
    assert read_metadata("again.mp4")["seed"] == 8
    assert not np.array_equal(read_frames(fox), read_frames("again.mp4"))


def test_names_of_the_repetition(t2v: Run, fox: Path, workplace: Path) -> None:
    assert t2v("rerun", fox).stdout == "videos/fox-rerun.mp4\n"
    assert t2v("rerun", fox).stdout == "videos/fox-rerun-2.mp4\n"
    (workplace / "there").mkdir()
    assert t2v("rerun", fox, "--output", "there").stdout == "there/fox-rerun.mp4\n"
    refused = t2v("rerun", fox, "--output", fox)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr


def test_json_latents_and_contact_sheet(t2v: Run, fox: Path) -> None:
    result = t2v("rerun", fox, "--json", "--save-latents", "--contact-sheet", "--model", "demo")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["warning", "warning", "run"] and "stage" in kinds and kinds[-1] == "result"
    assert "model was weights and is demo" in events[0]["message"]
    assert "not the weights of then" in events[1]["message"]
    assert Path(events[-1]["latents"]).exists() and Path(events[-1]["contact_sheet"]).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "2.6.0"}}, "torch was 2.6.0 and is "),
        ({"dtype": "bf16"}, "dtype was bf16 and is fp32"),
        ({"device": "cuda:1", "gpu": "NVIDIA H200"}, "device was cuda and is cpu"),
        ({"vae_dtype": "bf16"}, "vae dtype was bf16 and is fp32"),
        ({"shift": 3.0}, "shift was 3.0 and is 5.0"),
        ({"files": {"block_0.safetensors": "sha256:00"}}, "not the weights of then"),
        ({"files": None}, "does not say which files"),
        ({"versions": {"torch": "\x1b[31m\n"}}, r"torch was '\x1b[31m\n' and is "),
    ],
)
def test_what_differs_is_told_before_the_run(
    t2v: Run, fox: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    def load(*_: object, **__: object) -> Pipeline:
        raise RequestError("the run begins")

    monkeypatch.setattr(Pipeline, "load", load)
    record = {key: value for key, value in (read_metadata(fox) | change).items() if value is not None}
    lines = t2v("rerun", rewrite(Path("changed.mp4"), record), "--device", "cpu").stderr.splitlines()
    assert any(said in line for line in lines[: lines.index("t2v: error: the run begins")]), lines


def test_changed_weights_are_named(t2v: Run, small: Run, tmp_path: Path) -> None:
    from tests import tiny

    weights = tiny.build(tmp_path / "mine", ("bf16",), seed=1)
    assert small("--output", "a.mp4", model=weights).exit_code == 0
    text = weights / "google/umt5-xxl/tokenizer.json"
    text.write_text(text.read_text() + "\n")
    (message,) = told(t2v("rerun", "a.mp4").stderr)
    assert "umt5-xxl/tokenizer.json" in message and "distill_model" not in message
    weights.rename(tmp_path / "elsewhere")
    gone = t2v("rerun", "a.mp4")
    assert gone.exit_code == 2 and str(weights) in gone.stderr and "--model DIR" in gone.stderr
    assert t2v("rerun", "a.mp4", "--model", tmp_path / "elsewhere").exit_code == 0


def test_the_machines_settings_do_not_replace_the_videos_model(t2v: Run, fox: Path) -> None:
    result = t2v("rerun", fox, env={"T2V_MODEL": "demo"})
    assert result.exit_code == 0 and told(result.stderr) == []


def test_a_named_model_and_its_weights_directory(t2v: Run, tiny_checkpoint: Path) -> None:
    name = "wan2.1-t2v-14b-4step-int8"
    record = {"prompt": "fox", "seed": 1, "height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 4}
    record |= {"sampler": "lcm", "model": name, "family": "wan2.1-t2v-14b-4step"}
    video = rewrite(Path("a.mp4"), record)
    # Found and opened: the tiny sizes are not the 14B's, which is told of its own file.
    wrong = t2v("rerun", video, "--weights", tiny_checkpoint)
    assert wrong.exit_code == 3 and str(tiny_checkpoint) in wrong.stderr
    # A record cannot send the program elsewhere: a named model's files are where the user has them.
    elsewhere = t2v("rerun", rewrite(Path("b.mp4"), record | {"weights": str(tiny_checkpoint)}))
    assert elsewhere.exit_code == 3 and "directory /weights" in elsewhere.stderr


RECORD: dict[str, Any] = {
    "prompt": "a red circle",
    "seed": 1,
    "height": 32,
    "width": 48,
    "frames": 5,
    "fps": 8,
    "steps": 4,
    "sampler": "lcm",
    "model": "demo",
    "guidance": 1.0,
    "negative_prompt": "",
    "noise_device": "cpu",
}
DEEP = "[" * 100_000
LIES: list[tuple[Any, str]] = [
    ("", "does not say how it was made"),
    ("a holiday in Rome", "does not say how it was made"),
    ("[1, 2]", "expected the record"),
    (DEEP, "does not say how it was made"),
    ('{"seed": ' + "9" * 5000 + "}", "does not say how it was made"),
    ('{"prompt": "' + "a" * (1 << 21) + '"}', "characters"),
    ({"title": "x"}, "its prompt"),
    ({k: v for k, v in RECORD.items() if k != "steps"}, "its steps"),
    (RECORD | {"decoded_from": {}}, "t2v decode"),
    (RECORD | {"format": RECORD_FORMAT + 1}, "newer"),
    (RECORD | {"format": "1"}, "format '1'"),
    (RECORD | {"format": 10**4000}, "more than 18 digits"),
    (RECORD | {"seed": "42"}, "seed '42'"),
    (RECORD | {"seed": True}, "seed True"),
    (RECORD | {"seed": 10**4000}, "more than 18 digits"),
    (RECORD | {"seed": 2**63}, "seed is"),
    (RECORD | {"seed": -1}, "seed is -1"),
    (RECORD | {"height": 32.0}, "height 32.0"),
    (RECORD | {"height": 1 << 40}, "height is"),
    (RECORD | {"frames": 6}, "frames is 6"),
    (RECORD | {"frames": [5]}, "frames [5]"),
    (RECORD | {"fps": 0}, "fps is 0"),
    (RECORD | {"steps": 10**9}, "steps is"),
    (RECORD | {"guidance": float("nan")}, "guidance nan"),
    (RECORD | {"guidance": 7}, "guidance is 7"),
    (RECORD | {"negative_prompt": 3}, "negative_prompt 3"),
    (RECORD | {"noise_device": "/dev/sda"}, "noise device"),
    (RECORD | {"sampler": None}, "sampler None"),
    (RECORD | {"sampler": "x" * 5000}, "sampler 'xxx"),
    (RECORD | {"sampler": "\x1b]0;owned\x07"}, r"\x1b"),
    (RECORD | {"prompt": ""}, "empty"),
    (RECORD | {"prompt": ["a"]}, "prompt ['a']"),
    (RECORD | {"prompt": "a" * 200_000}, "more than 100000"),
    (RECORD | {"model": "../../etc"}, "'../../etc', which this program does not know"),
    (RECORD | {"model": "/etc"}, "'/etc', which this program does not know"),
    (RECORD | {"model": ["demo"]}, "model ['demo']"),
    (RECORD | {"family": "directory"}, "--model DIR"),
    (RECORD | {"family": "directory", "weights": "etc"}, "--model DIR"),
    (RECORD | {"family": "directory", "weights": "/a\x00b"}, "--model DIR"),
    (RECORD | {"family": "directory", "weights": "/" + "x" * 300}, "--model DIR"),
    (RECORD | {"weights": 7}, "weights 7"),
    (RECORD | {"files": ["a"]}, "files ['a']"),
    (RECORD | {"files": {"a": 1}}, "files {'a': 1}"),
    (RECORD | {"versions": {"torch": None}}, "versions"),
    (RECORD | {"profile": {"name": "x"}}, "profile"),
    (RECORD | {"device": 0}, "device 0"),
]


@pytest.mark.parametrize(("record", "said"), LIES, ids=lambda value: str(value)[-40:])
def test_a_record_that_lies(
    t2v: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch, record: Any, said: str
) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    result = t2v("rerun", rewrite(workplace / "a.mp4", record))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert said in line and len(line) < 500
    assert "\x1b" not in line


@pytest.mark.parametrize(
    "content", [b"", b"not a video", b"\x00" * 4096, b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n"]
)
def test_what_is_no_video(t2v: Run, workplace: Path, content: bytes) -> None:
    (workplace / "a.mp4").write_bytes(content)
    result = t2v("rerun", "a.mp4")
    assert result.exit_code == 2 and "expected an mp4 file" in result.stderr


def test_no_file_at_all(t2v: Run) -> None:
    assert t2v("rerun", "nowhere.mp4").exit_code == 2
    assert t2v("rerun", ".").exit_code == 2
    assert t2v("rerun").exit_code == 2


def test_an_old_record_without_a_format_is_read(workplace: Path) -> None:
    assert read_record(rewrite(workplace / "a.mp4", RECORD)) == RECORD


def test_a_recorded_directory_is_absolute(fox: Path, tiny_checkpoint: Path) -> None:
    record = read_metadata(fox)
    assert record["weights"] == str(tiny_checkpoint) and record["family"] == "directory"
