"""Numbers and lists for people: bytes, counts, durations and many names as short text."""

from collections.abc import Sequence


def format_bytes(size_bytes: float) -> str:
    """Return ``size_bytes`` with a decimal unit, as vendors count: ``91.7 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def format_count(count: float) -> str:
    """Return ``count`` shortened: ``134.5M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def format_duration(duration_s: float) -> str:
    """Return ``duration_s`` as ``2 h 05 min``, ``3 min 07 s`` or ``8.4 s``."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def format_some(items: Sequence[str], n_shown: int = 3) -> str:
    """Return the first of ``items`` and how many there are besides: ``a, b, c and 7 more``."""
    more = f" and {len(items) - n_shown} more" if len(items) > n_shown else ""
    return f"{', '.join(items[:n_shown])}{more}"
