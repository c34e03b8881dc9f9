"""Which files a folder holds, and whether they still are what they were.

Sizes are compared whenever a folder is looked at, contents (sha256) before they
are read. A file whose contents were compared once is not read again by the same
process while its size and time of change stay the same.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes and the sha256 of its contents in hex."""

    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As JSON values by name."""
        return asdict(self)


_known: dict[tuple[str, int, int], str] = {}
"""(path, size, mtime in ns) → sha256, of every file that this process has read."""


def sha256(file: Path) -> str:
    """The sha256 of a file's contents in hex; read once a process while the file stays as it is."""
    stat = file.stat()
    known_as = (str(file), stat.st_size, stat.st_mtime_ns)
    if known_as not in _known:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        _known[known_as] = digest.hexdigest()
    return _known[known_as]


def files_below(folder: Path) -> list[str]:
    """Every file below a folder, as sorted relative POSIX paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digests(folder: Path, skip: Iterable[str] = ()) -> dict[str, FileDigest]:
    """What a folder holds, but for the files named in `skip`."""
    names = [name for name in files_below(folder) if name not in set(skip)]
    return {name: FileDigest((folder / name).stat().st_size, sha256(folder / name)) for name in names}


def from_json(files: Mapping[str, Mapping[str, Any]]) -> dict[str, FileDigest]:
    """The digests as a manifest keeps them."""
    return {name: FileDigest(int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}


def wrong_sizes(expected: Mapping[str, FileDigest], found: Mapping[str, int]) -> list[str]:
    """A sentence for each file that is missing or has another size; empty when all is well."""
    problems = []
    for name, digest in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != digest.size:
            problems.append(f"{name} has {found[name]} bytes, expected {digest.size}")
    return problems


def wrong_contents(expected: Mapping[str, FileDigest], folder: Path) -> list[str]:
    """As `wrong_sizes`, but also reads what the files contain."""
    sizes = {name: (folder / name).stat().st_size for name in expected if (folder / name).is_file()}
    problems = wrong_sizes(expected, sizes)
    for name, digest in expected.items():
        if sizes.get(name) == digest.size and (actual := sha256(folder / name)) != digest.sha256:
            problems.append(f"{name} has sha256 {actual[:12]}…, expected {digest.sha256[:12]}…")
    return problems
