"""Options that name several things: `train=a,val=b`."""

from m2mkd_ray.errors import UsageError


def pairs(text: str, meaning: str) -> dict[str, str]:
    """The parts of `train=a,val=b`, in order.

    Raises:
        UsageError: a part has no `=`; `meaning` says what was expected.
    """
    parts = [part.partition("=") for part in text.split(",") if part]
    if any(not (key and equals and value) for key, equals, value in parts):
        raise UsageError(f"Option {text!r} cannot be read. Expected {meaning}.")
    return {key: value for key, _, value in parts}
