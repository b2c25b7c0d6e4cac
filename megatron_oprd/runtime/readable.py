"""Numbers, times, sizes and errors as people read them."""

from __future__ import annotations

import math


def significant(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits; one below 0.001 or above 99,999 has an exponent.

    With an exponent there are three digits at most, so that the text has at most 8 characters besides a sign.
    """
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 99_999.5:
        return f"{value:.{min(digits, 3) - 1}e}"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    """Return a whole number: `1,234` below 100,000, then three digits and k, M, B or T: `135 M`, `1.70 B`."""
    if value < 99_999.5:
        return f"{value:,.0f}"
    units = ["k", "M", "B", "T"]
    while value >= 999_500 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value / 1000:#.3g}".rstrip(".") + f" {units[0]}"


def duration(seconds: float) -> str:
    """Return a time with its two largest units: `45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours + (minutes >= 30), 24)
    return f"{days} d {hours} h"


def error_line(error: BaseException, most: int | None = 200) -> str:
    """Return the text of an exception as one line of at most `most` characters, or the name of its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__
