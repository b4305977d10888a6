"""Downloading: what comes, where it goes, what is asked again, and what is never replaced."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from runtime.errors import WeightsError
from runtime.schema import PublishedFile, Source
from runtime.weights import Plan, Progress, PullReporter, note_damage, pull, read_record, verify
from tests.hub import Hub, cut, slow
from tests.unit.weights_fixtures import (
    HASTE,
    REPOSITORY,
    contents,
    manifest,
    model,
    parts,
    pickle_zip,
    safetensors,
)

A, B, T5, CONFIG = model()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


class Listener(PullReporter):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.plans: list[Plan] = []
        self.steps: list[Progress] = []

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress)


def test_brings_what_is_wanted_and_no_more(hub: Hub, tmp_path: Path) -> None:
    files = model()
    commit = hub.publish(
        REPOSITORY, files | {"README.md": b"#", "distill_int8/block_0.safetensors": files[A]}
    )
    listener = Listener()
    done = pull(manifest(files), tmp_path / "w", listener, patience=HASTE)
    assert contents(tmp_path / "w") == files
    assert done.received == done.bytes == sum(map(len, files.values()))
    assert not done.complete_before
    assert listener.plans[0].missing == listener.steps[-1].bytes == done.bytes
    assert listener.steps[-1].files_done == 4
    for name in files:
        assert (tmp_path / "w" / name).stat().st_mode & 0o777 == 0o444
    noted = read_record(tmp_path / "w", "tiny").files
    assert {name: pinned.bytes for name, pinned in noted.items()} == {n: len(d) for n, d in files.items()}
    assert {pinned.commit for pinned in noted.values()} == {commit}
    assert not parts(tmp_path / "w")


def test_what_is_complete_needs_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    pull(manifest(files), tmp_path, patience=HASTE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    done = pull(manifest(files), tmp_path, patience=HASTE)
    assert done.complete_before
    assert done.files == 4
    assert done.received == 0


def test_nothing_to_bring_for_weights_that_ship(tmp_path: Path) -> None:
    done = pull(manifest([], embedded="demo/weights", source=None), tmp_path / "w")
    assert done.complete_before
    assert done.files == 0
    assert not (tmp_path / "w").exists()


def test_a_cut_connection_is_continued(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(
        A, cut(10_000), cut(5_000), cut(1), cut(20_000), cut(3)
    )  # more cuts than tries: each brought some
    done = pull(manifest(files), tmp_path, patience=HASTE)
    assert contents(tmp_path) == files
    starts = [asked.start for asked in hub.bodies(A)]
    assert starts == [0, 10_000, 15_000, 15_001, 35_001, 35_004]
    assert done.received == done.bytes


KILLED = """
import sys
from pathlib import Path
from runtime.weights import pull
from tests.unit.weights_fixtures import HASTE, manifest, model
pull(manifest(model()), Path(sys.argv[1]), patience=HASTE)
"""


def test_a_killed_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    """kill -9 in the middle of a file: what has arrived is asked for never again."""
    files = model()
    hub.publish(REPOSITORY, files)
    for name in (A, B, T5):
        hub.misbehave(name, slow(1_000, 0.05))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 20
    try:
        while parts(tmp_path).get("block_0.safetensors", 0) < 9_000 or not (tmp_path / CONFIG).exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    left = parts(tmp_path)
    assert 9_000 <= left["block_0.safetensors"] < len(files[A])
    assert set(contents(tmp_path)) == {CONFIG}
    hub.asked.clear()
    done = pull(manifest(files), tmp_path, patience=HASTE)
    assert contents(tmp_path) == files
    assert done.received == done.bytes - sum(left.values()) - len(files[CONFIG])
    for name in (A, B, T5):
        assert [asked.start for asked in hub.bodies(name)] == [left[Path(name).name]]
    assert not hub.bodies(CONFIG)


def test_two_downloads_at_once(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(A, slow(6_000, 0.05))
    wanted, listener = manifest(files), Listener()
    first = threading.Thread(target=lambda: pull(wanted, tmp_path, patience=HASTE))
    first.start()
    while not hub.bodies(A):
        time.sleep(0.01)
    done = pull(wanted, tmp_path, listener, patience=HASTE)
    first.join()
    assert done.complete_before
    assert contents(tmp_path) == files
    assert len(hub.bodies()) == 4
    (told,) = listener.notices
    assert told.startswith(f"process {os.getpid()} on ")
    assert told.endswith(f"(tiny) is downloading into {tmp_path}; waiting until it ends.")


def test_an_interrupt_keeps_what_has_arrived(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(A, slow(1_000, 0.05))

    class Impatient(PullReporter):
        def progress(self, progress: Progress) -> None:
            if progress.bytes:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(manifest([A]), tmp_path, Impatient(), patience=HASTE)
    assert 0 < parts(tmp_path)["block_0.safetensors"] < len(files[A])  # left at the next bytes
    assert not contents(tmp_path)


def test_files_of_several_repositories_go_where_the_manifest_says(hub: Hub, tmp_path: Path) -> None:
    transformer, encoder = safetensors(5_000, 5), pickle_zip(4_000, 6)
    hub.publish(REPOSITORY, {"one.safetensors": transformer})
    hub.publish("tester/encoders", {"t5.pth": encoder})
    companion = Source(repository="tester/encoders", files=(PublishedFile(path="t5.pth", to="parts/t5.pth"),))
    pull(manifest(["one.safetensors"], companions=(companion,)), tmp_path, patience=HASTE)
    assert contents(tmp_path) == {"one.safetensors": transformer, "parts/t5.pth": encoder}


def test_an_optional_file_may_be_missing(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, {A: model()[A]})
    wanted = manifest([], files=(PublishedFile(path=A), PublishedFile(path=CONFIG, optional=True)))
    pull(wanted, tmp_path, patience=HASTE)
    asked = len(hub.asked)
    assert pull(wanted, tmp_path, patience=HASTE).complete_before  # its absence was noted
    assert len(hub.asked) == asked
    with pytest.raises(WeightsError, match=r"tester/tiny has no file .*config\.json at revision"):
        pull(manifest([A, CONFIG], name="strict"), tmp_path / "other", patience=HASTE)


def test_the_same_bytes_are_not_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    """Another model's verified file serves under a second name."""
    files = model()
    hub.publish(REPOSITORY, files | {"again/t5.pth": files[T5]})
    pull(manifest([A, T5]), tmp_path, patience=HASTE)
    done = pull(manifest(["again/t5.pth", B], name="second"), tmp_path, patience=HASTE)
    assert not hub.bodies("again/t5.pth")
    assert done.received == len(files[B])
    assert (tmp_path / "again/t5.pth").samefile(tmp_path / T5)


def test_what_lies_there_from_elsewhere_is_verified_and_kept(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    for name in (A, CONFIG):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    pull(manifest(files), tmp_path, patience=HASTE)
    assert not hub.bodies(A)
    assert not hub.bodies(CONFIG)
    assert set(read_record(tmp_path, "tiny").files) == set(files)


@pytest.mark.parametrize("name", [A, CONFIG])
@pytest.mark.parametrize("change", ["length", "byte"])
def test_what_is_not_ours_is_never_replaced(hub: Hub, tmp_path: Path, name: str, change: str) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    own = files[name] + b"!" if change == "length" else files[name][:-1] + b"!"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(own)
    with pytest.raises(WeightsError, match=r"is not the published .* not replaced; move it away"):
        pull(manifest(files), tmp_path, patience=HASTE)
    assert (tmp_path / name).read_bytes() == own


def test_a_file_that_rots_is_found_and_replaced(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    wanted = manifest(files)
    pull(wanted, tmp_path, patience=HASTE)
    rotten = bytearray(files[B])
    rotten[-5] ^= 1
    (tmp_path / B).chmod(0o644)
    (tmp_path / B).write_bytes(rotten)
    assert all(check.state == "ok" for check in verify(wanted, tmp_path))  # the header and the size are whole
    checks = verify(wanted, tmp_path, full=True)
    assert [check.target for check in checks if check.state == "wrong"] == [B]
    assert note_damage(wanted, tmp_path, checks)
    assert pull(wanted, tmp_path, patience=HASTE).received == len(files[B])
    assert contents(tmp_path) == files
    assert all(check.state == "ok" for check in verify(wanted, tmp_path, full=True))


def test_a_noted_file_stays_the_one_it_was(hub: Hub, tmp_path: Path) -> None:
    """The publisher goes on: a file that is lost here comes again from the commit that the others are of."""
    files = model()
    hub.publish(REPOSITORY, files)
    wanted = manifest(files)
    pull(wanted, tmp_path, patience=HASTE)
    newer = files | {B: safetensors(40_000, 9)}
    hub.publish(REPOSITORY, newer)
    (tmp_path / B).unlink()
    pull(wanted, tmp_path, patience=HASTE)
    assert contents(tmp_path) == files
    hub.repositories[REPOSITORY].old.clear()  # history rewritten
    (tmp_path / B).unlink()
    with pytest.raises(WeightsError, match=r"no tester/tiny at revision .*--revision \(main"):
        pull(wanted, tmp_path, patience=HASTE)
    pull(wanted, tmp_path, revision="main", patience=HASTE)
    assert contents(tmp_path) == newer
    assert verify(wanted, tmp_path, full=True)[1].state == "ok"


def test_a_digest_that_the_manifest_knows(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    other = PublishedFile(path=A, bytes=len(files[A]), sha256="0" * 64, known="published")
    with pytest.raises(WeightsError, match=r"has another .*block_0.* than the manifest says.*0000"):
        pull(manifest([], files=(other, PublishedFile(path=B))), tmp_path, patience=HASTE)
    assert not hub.bodies()


@pytest.mark.parametrize(
    "path",
    ["../up.safetensors", "/etc/passwd", "a/../b", ".t2v/tiny.json", "a//b", "a/", "c:\\x", "a\nb", ""],
)
def test_a_manifest_cannot_name_a_path_outside(path: str) -> None:
    with pytest.raises(ValidationError):
        PublishedFile(path=path)
    with pytest.raises(ValidationError):
        PublishedFile(path="a", to=path)


def test_names_in_a_listing_are_never_paths(hub: Hub, tmp_path: Path) -> None:
    files = model()
    evil = {"../evil": b"x" * 2_000, "/tmp/evil": b"x", f"{tmp_path}/evil": b"x", "a/../../evil": b"x"}
    hub.publish(REPOSITORY, files | evil)
    directory = tmp_path / "deep" / "w"
    pull(manifest(files), directory, patience=HASTE)
    assert contents(directory) == files
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["w"]


@pytest.mark.parametrize("notes", ["{", "[]", '{"model": "tiny", "files": {"a": {"bytes": -1}}}', "\0"])
def test_broken_notes_are_told(hub: Hub, tmp_path: Path, notes: str) -> None:
    (tmp_path / ".t2v").mkdir()
    (tmp_path / ".t2v" / "tiny.json").write_text(notes)
    with pytest.raises(WeightsError, match=r"tiny\.json does not hold the notes of a download; remove it"):
        pull(manifest([A]), tmp_path, patience=HASTE)


def test_notes_cannot_name_a_path_outside(hub: Hub, tmp_path: Path) -> None:
    """Otherwise a file anywhere could be linked into place as another model's twin."""
    files = model()
    hub.publish(REPOSITORY, files)
    pull(manifest([A]), tmp_path / "w", patience=HASTE)
    notes = tmp_path / "w" / ".t2v" / "tiny.json"
    (tmp_path / "outside").write_bytes(files[T5])
    record = json.loads(notes.read_text())
    digest = hashlib.sha256(files[T5]).hexdigest()
    record["files"]["../outside"] = record["files"][A] | {"sha256": digest, "bytes": len(files[T5])}
    notes.write_text(json.dumps(record))
    with pytest.raises(WeightsError, match="does not hold the notes"):
        pull(manifest([T5], name="second"), tmp_path / "w", patience=HASTE)
