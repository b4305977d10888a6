"""A machine for shell scripts: a PATH of named tools, fakes that note each call, and a root of its own."""

import shutil
import subprocess
from pathlib import Path

TOOLS = (
    *(
        "awk",
        "bash",
        "cat",
        "chmod",
        "cp",
        "cut",
        "dirname",
        "env",
        "find",
        "git",
        "grep",
        "install",
        "mkdir",
    ),
    *("mv", "rm", "sed", "sha256sum", "sort", "stat", "tail", "touch"),
)
"""What every Debian has and no test needs to fake; all else is missing until it is faked."""


class FakeMachine:
    """Runs scripts with `DESTDIR` set to `root`; `calls` is what its fakes were asked, in order."""

    def __init__(self, place: Path) -> None:
        self.root = place / "root"
        self.bin = place / "bin"
        self._log = place / "calls"
        self.root.mkdir(parents=True)
        self.bin.mkdir()
        self._log.touch()
        for tool in TOOLS:
            real = shutil.which(tool)
            assert real is not None, tool
            (self.bin / tool).symlink_to(real)

    def fake(self, name: str, script: str = "") -> None:
        """A command that notes its name and arguments and then runs `script`, a few lines of shell."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        note = f'printf "%s" "{name}" >>"$CALLS"; [ $# = 0 ] || printf " %s" "$@" >>"$CALLS"; echo >>"$CALLS"'
        path.write_text(f"#!/bin/sh\n{note}\n{script}\n")
        path.chmod(0o755)

    def remove(self, name: str) -> None:
        """The command is not installed."""
        (self.bin / name).unlink(missing_ok=True)

    def write(self, path: str, text: str = "") -> Path:
        """A file below the root."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def path(self, path: str) -> Path:
        """Where a path of the machine is here."""
        return self.root / path.lstrip("/")

    @property
    def calls(self) -> list[str]:
        """Each call of a fake, as `name argument argument`."""
        return self._log.read_text().splitlines()

    def called(self, beginning: str) -> list[str]:
        """The calls that begin so."""
        return [call for call in self.calls if call.startswith(beginning)]

    def forget(self) -> None:
        """Begin a new list of calls."""
        self._log.write_text("")

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script with nothing in its environment but PATH, DESTDIR and what is given."""
        return subprocess.run(
            [str(word) for word in command],
            env={"PATH": str(self.bin), "DESTDIR": str(self.root), "CALLS": str(self._log), **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
