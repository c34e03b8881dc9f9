"""Numbers as people read them; the same in figures, tables and prose."""


def percent(fraction: float, digits: int = 1) -> str:
    """0.7042 as "70.4 %"."""
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with a true minus sign: 0.114 as "+11.4"."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def count(number: float) -> str:
    """1234567 as "1.23 M", 4000 as "4,000"."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """4.2 as "4.2 s", 200 as "3 min 20 s", 7500 as "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def epochs(number: float) -> str:
    """2.0 as "2", 2.5 as "2.5"."""
    return f"{number:.2f}".rstrip("0").rstrip(".")
