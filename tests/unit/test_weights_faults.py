"""A hub, a network and a disk that misbehave: what passes is borne, the rest is told, nothing bad is kept."""

import errno
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from runtime.errors import WeightsError
from runtime.schema import PublishedFile
from runtime.weights import hub as hub_module
from runtime.weights import pull, read_record
from tests.hub import (
    Fault,
    Hub,
    cut,
    longer,
    other_range,
    redirect,
    short,
    slow,
    stall,
    status,
    text,
    whole,
    wrong,
)
from tests.unit.weights_fixtures import HASTE, REPOSITORY, contents, manifest, model, parts, safetensors

A, B, T5, CONFIG = model()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def refusal(directory: Path, paths: Any = (A,), **options: Any) -> str:
    """What a download that must fail says: one sentence of ours; nothing of the wanted files is in place."""
    with pytest.raises(WeightsError) as caught:
        pull(manifest(paths), directory, patience=HASTE, **options)
    assert "\n" not in str(caught.value)
    assert "huggingface" not in str(caught.value)  # the endpoint that was asked, and no other address
    return str(caught.value)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([cut(0), cut(30_000)], id="cut"),
        pytest.param([short(20_000)], id="ends early, as if whole"),
        pytest.param([cut(9_000), whole()], id="ignores the range"),
        pytest.param([cut(9_000), other_range()], id="another range"),
        pytest.param([cut(9_000), status(416)], id="no such range"),
        pytest.param([status(500), status(503), cut(1), status(502), status(504)], id="5xx"),
        pytest.param([status(429, Retry_After="0.1")], id="asks to wait"),
        pytest.param([slow(7_000, 0.01)], id="slow"),
        pytest.param([redirect("/cdn/tester/tiny/main/" + A)], id="redirect, relative"),
    ],
)
def test_what_passes_is_borne(hub: Hub, tmp_path: Path, faults: list[Fault]) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(A, *faults)
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert contents(tmp_path) == {A: files[A]}
    assert not hub.faults[A]  # all of them were met


def test_a_stalled_connection_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(A, stall(3))
    patience = hub_module.Patience(timeout=0.3, tries=2, pause=0.01)
    pull(manifest([A]), tmp_path, patience=patience)
    assert [asked.start for asked in hub.bodies(A)] == [0, 1]


def test_a_listing_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave("api", status(503), status(429, Retry_After="0"))
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert set(contents(tmp_path)) == {A}


def test_redirects_to_another_host_get_no_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = model()
    with Hub() as cdn:
        for one in (hub, cdn):
            one.publish(REPOSITORY, files)
        hub.repositories[REPOSITORY].token = "hf_secret"
        hub.cdn = cdn.endpoint
        hub.misbehave(A, cut(1))  # not met: the bytes are elsewhere
        pull(manifest([A]), tmp_path, patience=HASTE)
        assert [one.headers.get("authorization") for one in hub.asked] == ["Bearer hf_secret"] * 2
        (asked,) = cdn.asked
        assert "authorization" not in asked.headers
        assert "hf_secret" not in str(asked.headers)
    assert contents(tmp_path) == {A: files[A]}


@pytest.mark.parametrize("fault", [wrong(20_000), wrong(2), longer(3)], ids=["data", "header", "length"])
def test_wrong_bytes_are_removed_and_the_rest_stays(hub: Hub, tmp_path: Path, fault: Fault) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    pull(manifest([CONFIG], name="before"), tmp_path, patience=HASTE)
    hub.misbehave(A, fault)
    message = refusal(tmp_path)
    assert A in message
    assert "arrived broken" in message or "longer than" in message
    assert set(contents(tmp_path)) == {CONFIG}
    assert not read_record(tmp_path, "tiny").files
    assert parts(tmp_path).get("block_0.safetensors", 0) <= len(files[A])
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert contents(tmp_path) == {A: files[A], CONFIG: files[CONFIG]}


def test_a_small_file_is_held_to_its_git_id(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(CONFIG, wrong(3))
    assert "git id" in refusal(tmp_path, (CONFIG,))
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.safetensors", b"<html>" * 500),
        ("a.safetensors", safetensors(3_000)[:-1]),
        ("a.pth", safetensors(3_000)),
        ("a.json", b"{" * 100),
    ],
)
def test_what_is_published_broken_is_not_put_into_place(
    hub: Hub, tmp_path: Path, name: str, data: bytes
) -> None:
    hub.publish(REPOSITORY, {name: data})
    assert f"{name} of {REPOSITORY} arrived broken" in refusal(tmp_path, (name,))
    assert not contents(tmp_path)


def test_a_part_that_is_too_long_begins_anew(hub: Hub, tmp_path: Path) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(A, cut(10_000), *[status(500)] * 3)
    refusal(tmp_path)
    (part,) = (tmp_path / ".t2v").rglob("*.part")
    part.write_bytes(b"x" * (len(files[A]) + 1))
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert contents(tmp_path) == {A: files[A]}


def test_a_part_of_other_content_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(A, cut(10_000), *[status(500)] * 3)
    refusal(tmp_path)
    newer = {A: safetensors(70_000, 7)}
    hub.publish(REPOSITORY, newer)
    hub.asked.clear()
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert [asked.start for asked in hub.bodies(A)] == [0]
    assert contents(tmp_path) == newer
    assert not parts(tmp_path)


# --------------------------------------------------------------------------------------------------- refusals


def test_without_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(REPOSITORY, model(), token="hf_right")
    assert f"{hub.endpoint} refuses tester/tiny (401), or has no such thing; set HF_TOKEN" in refusal(
        tmp_path
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(tmp_path)
    assert "refuses tester/tiny (403)" in message
    assert "licence" in message
    assert "hf_wrong" not in message
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    pull(manifest([A]), tmp_path, patience=HASTE)


def test_no_such_repository_revision_or_file(hub: Hub, tmp_path: Path) -> None:
    assert "has no tester/tiny (404)" in refusal(tmp_path)
    hub.publish(REPOSITORY, model())
    assert "has no tester/tiny at revision v9; name another with --revision" in refusal(
        tmp_path, revision="v9"
    )
    assert "has no file absent.json at revision" in refusal(tmp_path, ("absent.json",))
    hub.misbehave(A, status(404, X_Error_Code="EntryNotFound"))
    assert f"has no {A} of tester/tiny (404)" in refusal(tmp_path)
    assert len(hub.asked) == 6  # what is refused is not asked for again


def test_too_many_requests(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(A, cut(5_000), status(429, Retry_After="3600"))
    message = refusal(tmp_path)
    assert "(429) and asks to wait 3600 s; run the same command after that: it continues" in message
    assert parts(tmp_path) == {"block_0.safetensors": 5_000}
    hub.misbehave("api", *[status(429)] * 3)
    assert "asks to wait a while" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["api", A])
def test_a_hub_that_stays_broken(hub: Hub, tmp_path: Path, where: str) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(where, *[status(503)] * 10)
    assert f"The hub at {hub.endpoint} answers 503 for" in refusal(tmp_path)
    assert len(hub.faults[where]) == 10 - HASTE.tries


def test_a_file_that_never_gets_whole(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(A, *[short(0)] * 10)
    assert f"sends less of {A} of tester/tiny than it lists" in refusal(tmp_path)
    hub.faults[A].clear()
    hub.misbehave(A, *[cut(0)] * 10)
    assert "does not answer for" in refusal(tmp_path)


@pytest.mark.parametrize("body", [b"<html>Log in to the network</html>", b"[]", b'{"sha": 1}', b"\xff\x00"])
def test_what_is_no_hub(hub: Hub, tmp_path: Path, body: bytes) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave("api", text(body))
    message = refusal(tmp_path)
    assert f"What answers at {hub.endpoint} is no hub of models" in message
    assert "HF_ENDPOINT" in message


@pytest.mark.parametrize(
    "entry",
    [
        {"size": None},
        {"size": -1},
        {"size": "9"},
        {"size": True},
        {"blobId": "../../x"},
        {"lfs": {"sha256": "../../../x", "size": 9, "pointerSize": 1}},
        {"lfs": {"sha256": "A" * 64, "size": 9, "pointerSize": 1}},
    ],
)
def test_a_listing_with_nonsense(hub: Hub, tmp_path: Path, entry: dict[str, Any]) -> None:
    hub.publish(REPOSITORY, model())
    hub.repositories[REPOSITORY].listing = [{"rfilename": A, "size": 9} | entry]
    assert "is no hub of models" in refusal(tmp_path)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "gopher://x/", "http://127.0.0.1:1/x", "http://["]
)
def test_redirects_to_nowhere(hub: Hub, tmp_path: Path, location: str) -> None:
    hub.publish(REPOSITORY, model())
    hub.misbehave(A, *[redirect(location)] * 5)
    assert "does not answer for" in refusal(tmp_path)
    assert not contents(tmp_path)


def test_no_hub_and_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "The hub at http://127.0.0.1:1 does not answer for tester/tiny" in refusal(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "does not answer for tester/tiny" in refusal(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert "HF_HUB_OFFLINE forbids" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------- disk


def test_no_room_is_seen_before_the_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, 20_000_000_000))
    with pytest.raises(WeightsError) as caught:
        files = (PublishedFile(path=A, about_gb=15.0), PublishedFile(path=B, about_gb=7.5))
        pull(manifest([], files=files), tmp_path, patience=HASTE)
    assert f"tiny needs about 22.5 GB more in {tmp_path}" in str(caught.value)
    assert "20.0 GB are free there; make room for 2.5 GB" in str(caught.value)
    assert not hub.asked


def test_what_has_arrived_needs_no_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = model()
    hub.publish(REPOSITORY, files)
    hub.misbehave(A, cut(50_000), *[status(500)] * 3)
    refusal(tmp_path)
    left = len(files[A]) - 50_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, left - 1))
    hub.faults[A].clear()
    assert f"needs {left / 1000:.1f} kB more" in refusal(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, left))
    pull(manifest([A]), tmp_path, patience=HASTE)
    assert contents(tmp_path) == {A: files[A]}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_on_the_way(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    hub.publish(REPOSITORY, model())

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "x.part"))

    monkeypatch.setattr(hub_module.Hub, "_append", fail)
    message = refusal(tmp_path)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert ("is full" in message and "it continues" in message) if full else "cannot be written" in message


def test_a_disk_that_is_full_for_real(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        files = model()
        hub.publish(REPOSITORY, files)
        assert "make room for" in refusal(disk, (A, B))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, 10**12))
        assert "is full" in refusal(disk, (A, B))
        assert contents(disk).items() <= files.items()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        done = pull(manifest([A, B]), disk, patience=HASTE)
        assert contents(disk) == {A: files[A], B: files[B]}
        assert done.received < len(files[A]) + len(files[B])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_cannot_be_made(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(tmp_path / "file" / "w")
