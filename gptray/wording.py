"""Words for people: counts, times, perplexities, errors."""

from __future__ import annotations

# The seconds from which a unit is used, its size in seconds, and its name.
_UNITS = ((48 * 3600.0, 24 * 3600.0, "day"), (3550.0, 3600.0, "h"), (100.0, 60.0, "min"))


def count(number: int, noun: str) -> str:
    """A count with its noun: "1 step", "3,750 steps"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def time_words(seconds: float) -> str:
    """A time in the one unit that suits its size: "2.5 h", "45 min", "8 s"."""
    size, unit = next(
        ((size, unit) for least, size, unit in _UNITS if seconds >= least), (1.0, "s")
    )
    value = seconds / size
    # One decimal below 10 ("1.5 h"), none for seconds.
    text = f"{value:.0f}" if unit == "s" or value >= 9.95 else f"{value:.1f}".removesuffix(".0")
    if text == "0":
        return "less than a second"
    return f"{text} {unit}" + ("s" if unit == "day" and text != "1" else "")


def duration(seconds: float) -> str:
    """A time to the minute or the second: "1h02m", "3m05s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def size_words(num_bytes: int) -> str:
    """An amount of data: "12 bytes", "20.0 kB", "1,234.5 MB"."""
    if num_bytes < 1000:
        return count(num_bytes, "byte")
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 999_950 else f"{num_bytes / 1e3:,.1f} kB"


def magnitude(number: int) -> str:
    """A large number as people say it: "17.7 million"; others as "4,352"."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number:,}"


def perplexity(value: float, *, places: int = 1) -> str:
    """A perplexity; a huge one, mostly charged for lost text, is rounded to two digits."""
    return f"{value:,.{places}f}" if value < 1e9 else f"{value:.1e}"


def decimals(difference: float) -> int:
    """The decimals that show a difference: two, or more for a small one."""
    for places in (2, 3, 4):
        if abs(difference) >= 10**-places:
            return places
    return 5


def shortened(text: str, most: int, *, mark: str = "...") -> str:
    """The text, cut to `most` characters with a mark at the end if it is longer."""
    return text if len(text) <= most else text[: most - len(mark)] + mark


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
