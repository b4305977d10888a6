"""Tests of kernels in Triton's interpreter, which has to be asked for before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def in_interpreter(name: str) -> None:
    """Run the tests of the file `name` beside this one in a process of their own; all must pass."""
    options = ["-s", "-p", "no:cacheprovider", "-p", "no:warnings"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / name), *options],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
