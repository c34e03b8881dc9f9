"""What a store asks of a file system, answered by local disks and by remote ones.

Both promise the same: a single file is replaced whole, and a folder that is `put`
is not taken for whole before its last file is there. A local folder is put by one
rename; a remote one file by file, the last file (a manifest) at the end. Local
folders are read in place; remote ones are copied to a cache on the node that reads.

Paths are relative to the root, with `/` between their parts.
"""

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from m2mkd_ray.errors import StoreError
from m2mkd_ray.execution.scratch import private_folder, process_folder

logger = logging.getLogger(__name__)

_SCRATCH_PREFIX = "out-"


class Folders(Protocol):
    """The seam between the store and a file system."""

    is_local: bool

    def read(self, path: str) -> bytes | None:
        """A file's contents, None if there is none."""

    def write(self, path: str, data: bytes) -> None:
        """Replace a file whole."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False if it does."""

    def sizes(self, path: str) -> dict[str, int]:
        """Bytes of every file below a folder by relative path; empty if there is no folder."""

    def names(self, path: str) -> list[str]:
        """What is directly below a folder, sorted; empty if there is no folder."""

    def fetch(self, path: str, files: Iterable[str], version: str) -> Path:
        """A local folder with `files` of the folder at `path`; `version` tells its contents apart."""

    def put(self, source: Path, path: str, last: str) -> bool:
        """Make the local folder `source` the folder at `path`; False if that is there with its file `last`."""

    def move(self, path: str, target: str) -> None:
        """Move a folder or file."""

    def delete(self, path: str) -> None:
        """Delete a folder or file, if it is there."""

    def scratch(self, path: str) -> Path:
        """A new empty local folder, from which putting something at `path` is cheap."""

    def forget_scratch(self, path: str) -> None:
        """Delete all such folders of `path`; of those on this node's disk, its own and what dead processes left."""

    def where(self, path: str) -> str:
        """A path or URI that other libraries understand."""

    def free_bytes(self) -> int | None:
        """Space left, None where it cannot be known."""


def why(error: OSError, root: str) -> str:
    """An operating system's error on a store, as a sentence that says what to do."""
    where = f"`{error.filename or root}`"
    match error.errno:
        case errno.ENOTDIR | errno.EEXIST:
            found = f"a file is in the way at {where}; delete it or choose another folder"
        case errno.EACCES | errno.EPERM:
            found = f"this user may not write at {where}; change its owner or choose another folder"
        case errno.EROFS:
            found = f"the file system of {where} is read-only; choose another folder"
        case errno.ENOENT:
            found = f"no folder can be made at {where}; choose another folder"
        case errno.ENOSPC | errno.EDQUOT:
            found = f"no space is left at {where}; free some or choose another folder"
        case _:
            found = f"{error.strerror or error} at {where}"
    return f"The store `{root}` cannot be written: {found}."


class LocalFolders:
    """A folder on a disk that this process can reach by path (NFS included)."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes | None:
        """See `Folders`."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """See `Folders`."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def create(self, path: str, data: bytes) -> bool:
        """See `Folders`."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        temporary.write_bytes(data)
        try:
            # A hard link is as exclusive as O_EXCL, and the file has its contents from the first moment.
            os.link(temporary, target)
            return True
        except FileExistsError:
            return False
        except OSError:
            return _create_exclusively(target, data)  # a file system without hard links
        finally:
            temporary.unlink()

    def sizes(self, path: str) -> dict[str, int]:
        """See `Folders`."""
        folder = self.root / path
        return {
            file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
        }

    def names(self, path: str) -> list[str]:
        """See `Folders`."""
        folder = self.root / path
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def fetch(self, path: str, files: Iterable[str], version: str) -> Path:
        """See `Folders`."""
        return self.root / path

    def put(self, source: Path, path: str, last: str) -> bool:
        """See `Folders`."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # After a power cut a rename may be there without the contents. Of the other files sizes and hashes tell.
        _sync(source / last)
        _sync(source)
        try:
            source.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (target / last).exists():
                return False
            # A folder without its last file is not ours to trust: out of the way, then ours.
            shutil.rmtree(target)
            source.rename(target)
        _sync(target.parent)
        return True

    def move(self, path: str, target: str) -> None:
        """See `Folders`."""
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).rename(self.root / target)

    def delete(self, path: str) -> None:
        """See `Folders`."""
        target = self.root / path
        if target.is_dir():
            # Renamed first: a folder that is half deleted must not be taken for the folder.
            doomed = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
            try:
                target.rename(doomed)
            except FileNotFoundError:
                return  # someone else was faster
            shutil.rmtree(doomed)
        else:
            target.unlink(missing_ok=True)

    def scratch(self, path: str) -> Path:
        """See `Folders`."""
        parent = self.root / path
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f"{_SCRATCH_PREFIX}{uuid.uuid4().hex[:8]}"  # mkdtemp's would be for this user only
        folder.mkdir()
        return folder

    def forget_scratch(self, path: str) -> None:
        """See `Folders`."""
        # `delete` renames first: a worker taken for lost may be committing one of them, and either moves it whole.
        for folder in (self.root / path).glob(f"{_SCRATCH_PREFIX}*"):
            self.delete(f"{path}/{folder.name}")

    def where(self, path: str) -> str:
        """See `Folders`."""
        return str(self.root / path)

    def free_bytes(self) -> int | None:
        """See `Folders`."""
        return shutil.disk_usage(self.root).free


def _sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _create_exclusively(target: Path, data: bytes) -> bool:
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
    return True


class RemoteFolders:
    """A folder of any pyarrow file system, with a cache on the node that reads."""

    is_local = False

    def __init__(self, filesystem: fs.FileSystem, root: str, cache: Path | None, base: str) -> None:
        self.filesystem = filesystem
        self.base = base.rstrip("/")
        self.root = root.rstrip("/")
        root_hash = hashlib.sha256(f"{filesystem.type_name}:{self.root}".encode()).hexdigest()[:12]
        self.cache = (cache or private_folder("m2mkd-cache")) / root_hash

    def read(self, path: str) -> bytes | None:
        """See `Folders`."""
        try:
            with self.filesystem.open_input_stream(self._at(path)) as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """See `Folders`."""
        # An object appears whole when its stream is closed. File systems that are not object stores
        # may show part of it: readers of JSON here take what cannot be parsed for absent.
        self._make_parent(path)
        with self.filesystem.open_output_stream(self._at(path)) as stream:
            stream.write(data)

    def create(self, path: str, data: bytes) -> bool:
        """See `Folders`."""
        # pyarrow has no exclusive creation: look, write, and look who was last.
        if self.read(path) is not None:
            return False
        self.write(path, data)
        return self.read(path) == data

    def sizes(self, path: str) -> dict[str, int]:
        """See `Folders`."""
        base = self._at(path)
        found = self.filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return {self._below(info.path, base): info.size for info in found if info.type == fs.FileType.File}

    def names(self, path: str) -> list[str]:
        """See `Folders`."""
        found = self.filesystem.get_file_info(fs.FileSelector(self._at(path), allow_not_found=True))
        return sorted(info.base_name for info in found)

    def fetch(self, path: str, files: Iterable[str], version: str) -> Path:
        """See `Folders`."""
        target = self.cache / f"{path}@{version}"
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.scratch(path)
            for name in files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(
                    f"{self._at(path)}/{name}",
                    str(temporary / name),
                    source_filesystem=self.filesystem,
                    destination_filesystem=fs.LocalFileSystem(),
                )
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                shutil.rmtree(temporary)  # another worker of this node was faster
        return target

    def put(self, source: Path, path: str, last: str) -> bool:
        """See `Folders`."""
        if self.read(f"{path}/{last}") is not None:
            return False
        self.delete(path)
        names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
        for name in [*(name for name in names if name != last), last]:
            self._make_parent(f"{path}/{name}")
            fs.copy_files(
                str(source / name),
                f"{self._at(path)}/{name}",
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
            )
        return True

    def move(self, path: str, target: str) -> None:
        """See `Folders`."""
        # Object stores move nothing. The manifest goes first: from then on it is no artifact.
        if self.filesystem.get_file_info(self._at(path)).type != fs.FileType.Directory:
            self._make_parent(target)
            self.filesystem.copy_file(self._at(path), self._at(target))
            self.filesystem.delete_file(self._at(path))
            return
        names = sorted(self.sizes(path), key=lambda name: (name != "manifest.json", name))
        for name in names:
            self._make_parent(f"{target}/{name}")
            self.filesystem.copy_file(f"{self._at(path)}/{name}", f"{self._at(target)}/{name}")
            self.filesystem.delete_file(f"{self._at(path)}/{name}")
        self.delete(path)

    def delete(self, path: str) -> None:
        """See `Folders`."""
        info = self.filesystem.get_file_info(self._at(path))
        try:
            if info.type == fs.FileType.Directory:
                self.filesystem.delete_dir(self._at(path))
            elif info.type == fs.FileType.File:
                self.filesystem.delete_file(self._at(path))
        except FileNotFoundError:
            return  # someone else was faster

    def scratch(self, path: str) -> Path:
        """See `Folders`."""
        parent = process_folder(self.cache / "scratch") / path
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=parent))

    def forget_scratch(self, path: str) -> None:
        """See `Folders`."""
        shutil.rmtree(process_folder(self.cache / "scratch") / path, ignore_errors=True)  # there may be none

    def where(self, path: str) -> str:
        """See `Folders`."""
        return f"{self.base}/{path}"

    def free_bytes(self) -> int | None:
        """See `Folders`."""
        return None

    def _at(self, path: str) -> str:
        return "/".join(part for part in (self.root, path) if part)

    def _make_parent(self, path: str) -> None:
        self.filesystem.create_dir(self._at(path).rpartition("/")[0] or "/", recursive=True)

    @staticmethod
    def _below(path: str, base: str) -> str:
        return path.removeprefix(base).lstrip("/")


def open_folders(root: str, filesystem: fs.FileSystem | None, cache: Path | None) -> Folders:
    """The folders of a store's root: a path, a URI that pyarrow knows, or a path in a given file system.

    Raises:
        StoreError: the URI is none that pyarrow can open, or there is no safe place for the cache of a remote one.
    """
    if filesystem is not None:
        return RemoteFolders(filesystem, root, cache, base=root)
    if "://" not in root:
        return LocalFolders(Path(root).expanduser().absolute())
    try:
        found, path = fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"The store `{root}` cannot be opened: {error}. Give a path, or a URI that pyarrow knows "
            f"(file://, s3://, gs://, abfs://, hdfs://)."
        ) from error
    if isinstance(found, fs.LocalFileSystem):
        return LocalFolders(Path(path))
    return RemoteFolders(found, path, cache, base=root)
