"""Fingerprints tell files apart; large ones are not read whole."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import provenance


def test_a_small_file_has_its_plain_digest(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"four steps")
    assert provenance.fingerprint(file) == "sha256:" + hashlib.sha256(b"four steps").hexdigest()


def test_a_large_file_is_told_apart_by_size_and_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "FULL_DIGEST_LIMIT", 100)
    monkeypatch.setattr(provenance, "EDGE", 40)
    content = bytearray(range(200))

    def of(data: bytes) -> str:
        (tmp_path / "big.bin").write_bytes(data)
        return provenance.fingerprint(tmp_path / "big.bin")

    first = of(content)
    assert first.startswith("sha256-edges:")
    for place in (0, 39, 160, 199):
        changed = bytearray(content)
        changed[place] ^= 1
        assert of(changed) != first
    assert of(content + b"\0") != first
    assert of(content) == first


def test_a_file_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads, honest = tmp_path / "weights.bin", [], hashlib.file_digest

    def digest(*given: Any) -> Any:
        reads.append(given)
        return honest(*given)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    monkeypatch.setattr(provenance, "SETTLED", -1)  # no waiting for the clock: the sizes differ
    for content, count in ((b"four", 1), (b"four", 1), (b"steps", 2)):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
        assert provenance.fingerprint(file) == "sha256:" + hashlib.sha256(content).hexdigest()
        assert len(reads) == count
    monkeypatch.setattr(provenance, "SETTLED", 10**12)  # one that was just written may change unseen
    provenance.fingerprint(file)
    assert len(reads) == 3


def test_names_carry_the_directory(tmp_path: Path) -> None:
    for directory in ("distill_fp8", "distill_int8"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "block_0.safetensors").write_text(directory)
    found = provenance.fingerprints(sorted(tmp_path.glob("*/*")))
    assert set(found) == {"distill_fp8/block_0.safetensors", "distill_int8/block_0.safetensors"}
    assert len(set(found.values())) == 2


def test_versions_name_what_changes_pixels() -> None:
    told = provenance.versions()
    assert told["torch"] == torch.__version__
    assert {"python", "av", "tokenizers", "safetensors", "fourstep"} <= set(told)
