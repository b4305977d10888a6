"""Fill in the pins of the Dockerfiles that only a machine with the whole network can know.

    python .github/pins.py resolve Dockerfile.cu124 Dockerfile.cu128 > pins.json
    python .github/pins.py arguments pins.json Dockerfile.cu124       NAME=VALUE, a line for each --build-arg
    python .github/pins.py apply pins.json                            writes them into the Dockerfiles

There are two kinds. A base image is named by tag until its digest was seen: `ARG PYTHON_IMAGE=name:tag`
becomes `name:tag@sha256:...`, and stays so until a person takes the digest out to have a newer one resolved.
A source is named by commit; the digest of its archive, which docker/kernels/source.sh prints, goes into
`ARG <NAME>_SHA256` and is compared from then on: another one under the same commit is an error.
Standard library only: the workflow runs this before anything is installed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "docker" / "kernels" / "source.sh"


def arguments_of(dockerfile: Path) -> dict[str, str]:
    """Each ARG of a Dockerfile that has a default, without its quotes."""
    found = re.findall(r"^ARG +(\w+)=(\S*)$", dockerfile.read_text(encoding="utf-8"), flags=re.M)
    return {name: value.strip('"') for name, value in found}


def resolve(dockerfile: Path, seen: dict[str, str]) -> dict[str, str]:
    """The pins of one Dockerfile by the name of their ARG; `seen` keeps what was asked, so that all agree."""
    given = arguments_of(dockerfile)
    pins = {}
    for name, value in given.items():
        if name.endswith("_IMAGE"):
            if "@" not in value and value not in seen:
                seen[value] = image_digest(value)
            pins[name] = value if "@" in value else f"{value}@{seen[value]}"
    for url, name in sources_of(dockerfile):
        commit, expected = given[f"{name}_COMMIT"], given[f"{name}_SHA256"]
        key = f"{url} {commit} {expected}"
        if key not in seen:
            seen[key] = archive_digest(url, commit, expected)
        pins[f"{name}_SHA256"] = seen[key]
    if not pins:
        raise SystemExit(f"pins: {dockerfile} names no base image by ARG and no source; nothing to resolve.")
    return pins


def sources_of(dockerfile: Path) -> list[tuple[str, str]]:
    """The address of each source that a Dockerfile builds, and the name that its ARGs begin with."""
    text = dockerfile.read_text(encoding="utf-8")
    return re.findall(r'source\.sh (\S+) "\$\{?(\w+)_COMMIT\}?" "\$\{?\2_SHA256\}?"', text)


def image_digest(tag: str) -> str:
    """The digest that a registry has for an image's tag now: `sha256:` and 64 hex digits."""
    command = ["docker", "buildx", "imagetools", "inspect", tag, "--format", "{{json .Manifest}}"]
    digest = json.loads(output_of(command))["digest"]
    if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is None:
        raise SystemExit(f"pins: the digest of {tag} is {digest!r}; expected sha256: and 64 hex digits.")
    return str(digest)


def archive_digest(url: str, commit: str, expected: str) -> str:
    """The SHA-256 of a source's archive by the build's own script, which fails if it is not `expected`."""
    with tempfile.TemporaryDirectory() as place:
        told = output_of([str(SOURCE), url, commit, expected], place)
    line = re.search(rf"^source {re.escape(url)} {commit} sha256:([0-9a-f]{{64}})$", told, flags=re.M)
    if line is None:
        raise SystemExit(f"pins: {SOURCE.name} printed no digest of {url}; it said: {told.strip()!r}")
    return line[1]


def output_of(command: list[str], place: str | None = None) -> str:
    """What a command prints; SystemExit with its own words when it fails."""
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pins: {' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def apply(dockerfile: Path, pins: dict[str, str]) -> bool:
    """Write pins into a Dockerfile; whether that changed it. SystemExit unless each ARG is there once."""
    text = before = dockerfile.read_text(encoding="utf-8")
    for name, value in pins.items():
        line = f'ARG {name}="{value}"' if name.endswith("_SHA256") else f"ARG {name}={value}"
        text, count = re.subn(rf"^ARG +{name}=\S*$", line, text, flags=re.M)
        if count != 1:
            raise SystemExit(f"pins: {dockerfile} has {count} lines 'ARG {name}='; expected one.")
    dockerfile.write_text(text, encoding="utf-8")
    return text != before


def main(given: list[str]) -> None:
    """The command line, as the module's docstring shows it."""
    lines: list[str] = []
    match given:
        case ["resolve", *dockerfiles] if dockerfiles:
            seen: dict[str, str] = {}
            lines = [json.dumps({name: resolve(Path(name), seen) for name in dockerfiles}, indent=2)]
        case ["arguments", file, dockerfile]:
            pins = json.loads(Path(file).read_text(encoding="utf-8"))[dockerfile]
            lines = [f"{name}={value}" for name, value in pins.items()]
        case ["apply", file]:
            for dockerfile, pins in json.loads(Path(file).read_text(encoding="utf-8")).items():
                changed = apply(Path(dockerfile), pins)
                lines.append(f"{dockerfile}: {'pins written' if changed else 'pinned so already'}")
        case _:
            raise SystemExit(
                f"pins: {' '.join(given)!r} is none of resolve, arguments and apply (see its top)."
            )
    sys.stdout.write("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
