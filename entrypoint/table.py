"""Numbers and tables as people read them: aligned columns, one unit, no box around them."""

import textwrap
from collections.abc import Sequence

GAP = "  "


def duration(seconds: float) -> str:
    """`0.4 s`, `61.2 s`, `12 min 05 s`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def size(nbytes: int) -> str:
    """Bytes in the binary unit that leaves one to three digits before the point."""
    amount, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1000:
            break
        amount, unit = amount / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """`1 frame`, `81 frames`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def aligned(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    width: int | None = None,
) -> list[str]:
    """The lines of a table, its header first.

    `right` are the columns that are flush right (numbers). With `width` the last column is wrapped under
    itself to fit that many characters; without, each row is one line, as a pipe wants it.
    """
    cells = [[*map(str, row)] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        fixed = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        indent = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
        wrapped = [fixed[-1]]
        if width is not None and width - indent >= 20:
            wrapped = textwrap.wrap(row[-1], width - indent) or [""]
        lines.append(GAP.join([*fixed[:-1], wrapped[0]]).rstrip())
        lines += [" " * indent + rest for rest in wrapped[1:]]
    return lines
