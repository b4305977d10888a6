"""Whether every compiled library of a wheel holds code for every architecture that was promised.

    python check_architectures.py "8.0;8.6;8.9" WHEEL

Asks cuobjdump (the toolkit's, or the one that Triton brings). Build scripts skip architectures that they do
not know without a word, so this is asserted in the build and not hoped for at run time.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ELF = re.compile(r"\bsm_(\d+)[a-z]?\b")


def cuobjdump() -> str:
    """The program that lists what a binary holds."""
    found = shutil.which("cuobjdump")
    spec = None if found else find_spec("triton")
    if spec is not None and spec.origin is not None:
        found = next((str(path) for path in Path(spec.origin).parent.rglob("bin/cuobjdump")), None)
    if found is None:
        raise SystemExit("check_architectures: no cuobjdump, neither in the toolkit nor in triton.")
    return found


def held(library: Path, program: str) -> set[str]:
    """The architectures, as in "8.9", that `library` holds machine code for."""
    listed = subprocess.run(
        [program, "--list-elf", str(library)], capture_output=True, text=True, check=False
    )
    return {f"{number[:-1]}.{number[-1]}" for number in ELF.findall(listed.stdout)}


def check(promised: list[str], wheel: Path, program: str) -> None:
    """SystemExit when a library of the wheel lacks one, or when the wheel has no library."""
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        if not names:
            raise SystemExit(f"check_architectures: {wheel.name} holds no compiled library.")
        for name in names:
            found = held(Path(archive.extract(name, place)), program)
            missing = [one for one in promised if one not in found]
            if missing:
                has = ", ".join(sorted(found)) or "none"
                raise SystemExit(f"check_architectures: {name} lacks {', '.join(missing)}; it has {has}.")
            sys.stdout.write(f"{name}: {', '.join(sorted(found))}\n")


def main() -> None:
    """Check the wheels that are named."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: python check_architectures.py ARCHITECTURES WHEEL...")
    program = cuobjdump()
    for name in sys.argv[2:]:
        check(sys.argv[1].split(";"), Path(name), program)


if __name__ == "__main__":
    main()
