"""YAML files that people write: read whole, and what is wrong with one is told in one way."""

import reprlib
from pathlib import Path
from typing import Any

import yaml

from m2mkd_ray.errors import UsageError


def read_mapping(file: Path, what: str, expected: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        file: the file, UTF-8.
        what: what it is, for messages: "recipe file".
        expected: what it should hold, for messages: "settings by name".

    Raises:
        UsageError: it cannot be read, is not YAML or not UTF-8, or holds something else than a mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the {what} {file}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a date that there is not
        raise UsageError(f"The {what} {file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"The {what} {file} holds {reprlib.repr(content)}, expected {expected}.")
    return content
