"""How numbers, values and tables are printed, and durations read."""

import math
import re
from collections.abc import Iterable, Sequence

SHOWN_CHARACTERS = 80
LONGEST_DAYS = 9999  # of a duration: 27 years


def format_bytes(size: float) -> str:
    """A number of bytes in decimal units, to three digits: 1,500,000 as `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_duration(seconds: float) -> str:
    """A rough duration, to two digits: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    units = (("days", 86_400, 2 * 86_400), ("h", 3600, 5400), ("min", 60, 90), ("s", 1, 0))
    unit, size = next((unit, size) for unit, size, least in units if seconds >= least)
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 99.5 else f"{number:.2g} {unit}"


def format_clock(seconds: float) -> str:
    """An exact duration as hours, minutes and seconds: `1:02:03`, or `2:03`; `?` for one that is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_duration(text: str) -> int:
    """A duration in seconds: of `45s`, `30m`, `23h30m`, `1d2h`. Raises ValueError where it is none, nothing, or longer
    than LONGEST_DAYS."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= LONGEST_DAYS * 86_400:
        raise ValueError(f"{text!r} is no duration such as 45s, 30m, 23h30m or 1d2h, up to {LONGEST_DAYS}d")
    return total


def format_count(number: float) -> str:
    """A count with its unit, in up to six digits: 2,500,000,000 as `2.5 B` (B for 10^9, T for 10^12)."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def format_value(value: object) -> str:
    """A value of a user's data as an error message quotes it, cut after SHOWN_CHARACTERS characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its columns padded to one width. A `|` within a cell is escaped."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain text: columns of numbers are aligned to the right, all others to the left. A row that is
    shorter than the header is filled with empty cells."""
    lines = [[str(cell) for cell in row] + [""] * (len(header) - len(row)) for row in (header, *rows)]
    columns = []
    for name, *cells in zip(*lines, strict=True):
        width = max(map(len, (name, *cells)))
        justify = str.rjust if all(map(_is_number, cells)) else str.ljust
        columns.append([justify(cell, width) for cell in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _is_number(cell: str) -> bool:
    """Whether a cell holds a number or the lack of one: nothing, or a dash."""
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return cell in ("", "-")
    return True
