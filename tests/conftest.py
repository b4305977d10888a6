"""Fixtures that all tests share: the tiny checkpoint, made once for a test process."""

import os
from pathlib import Path

# Before torch: test processes run side by side, and threads that fight for two cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `tests.tiny`, with its bf16, fp8 and int8 variants. Read it, do not change it."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "weights")
