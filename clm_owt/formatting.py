"""Numbers and tables as people read them."""

import math


def show_bytes(size: float) -> str:
    """1,500,000 as 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.3g} {unit}"


def show_time(seconds: float) -> str:
    """As a rough number: 40 s, 12 min, 3.5 h, 2.1 days."""
    units = {"days": (86_400, 2 * 86_400), "h": (3600, 5400), "min": (60, 90), "s": (1, 0)}
    unit, (size, _) = next((unit, sizes) for unit, sizes in units.items() if seconds >= sizes[1])
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 99.5 else f"{number:.2g} {unit}"


def clock(seconds: float) -> str:
    """Seconds as people read them: 1:02:03, or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_count(number: float) -> str:
    """2,500,000,000 as 2.5 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


SHOWN_CHARACTERS = 80


def show_value(value: object) -> str:
    """A value of somebody's data in an error, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
