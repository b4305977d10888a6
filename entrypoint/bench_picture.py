"""The picture of a bench: drawn when it ends, or later from its JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.bench.picture import draw_forwards
from runtime.errors import OutputError, RequestError
from runtime.whole_file import whole_file


def write_picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw the JSON object of a bench into the SVG file `path`. RequestError, OutputError."""
    drawn = draw_forwards(found)
    try:
        with whole_file(path) as file:
            file.write(drawn.encode())
    except OSError as error:
        raise OutputError(
            f"The picture {path} cannot be written ({error.strerror}); name another file with --picture."
        ) from error


def redraw(source: Path, path: Path) -> None:
    """As `write_picture`, from a file that `t2v bench --json` wrote. RequestError, OutputError."""
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text at all
        why = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise RequestError(
            f"--from is {source}, which cannot be read ({why}); expected a file that t2v bench --json wrote"
        ) from error
    if not isinstance(found, dict) or found.get("event") != "bench":
        raise RequestError(f"--from is {source}; expected a file that t2v bench --json wrote")
    write_picture(found, path)
