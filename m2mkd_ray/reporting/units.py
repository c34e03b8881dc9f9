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


def quantity(number: float, unit: str) -> str:
    """Three digits and a prefix: 4.16e14 FLOP as "416 TFLOP", 0 as "0 FLOP"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{_three_digits(number / size)} {prefix}{unit}"
    return f"{_three_digits(number)} {unit}"


def memory(gigabytes: float) -> str:
    """0.0432 as "43 MB", 1.5 as "1.5 GB"."""
    return f"{1000 * gigabytes:.0f} MB" if gigabytes < 0.9995 else f"{gigabytes:.1f} GB"


def rate(per_second: float) -> str:
    """Images a second: 912.4 as "912", 3.21 as "3.2"."""
    return f"{per_second:,.0f}" if per_second >= 9.95 else f"{per_second:.1f}"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.3g}"
