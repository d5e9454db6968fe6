"""Files that are there whole or not at all, locks on outputs, digests of content, and finished stages of long work.

A stage is a folder whose name holds a digest of all that it was made from: with other data, another model or other
settings the name is another one, and nothing old is ever taken for new. A folder under its own name is complete; one
that ends in `.partial` is not, and only a stage that `resumes` finds its own partial folder again.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BLOCK, SAMPLED_BLOCKS = 1 << 20, 256  # bytes; 256 MiB take a tenth of a second
STAGE_VERSION = 2  # raise it whenever the same sources would give another content of any stage
STAGE_NAME = re.compile(r"[a-z0-9]+-[0-9a-f]{16}(\.partial)?")
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. It takes the name when the block ends well, and is removed
    otherwise. A process that is killed may leave it behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """On the disk when this returns."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; {} where it is missing, damaged, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def flush_to_disk(path: Path) -> None:
    """Bring a file, or everything under a folder with its names, from the system's memory to the disk."""
    for place in [*path.rglob("*"), path] if path.is_dir() else [path]:
        flush_one(place)


def flush_one(path: Path) -> None:
    """A file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks cannot
            raise
    finally:
        os.close(descriptor)


def is_real_folder(path: Path) -> bool:
    """Whether it is a folder itself and not a link to one, so that removing it removes nothing elsewhere."""
    return path.is_dir() and not path.is_symlink()


def lock_file_of(output: Path) -> Path:
    """The lock of an output file, or of an output folder that is replaced as a whole: beside it."""
    return output.with_name(f".{output.name}.lock")


def check_new_file(output: Path, overwrite: bool) -> None:
    """Raises ValueError for an output that is a folder, or that exists, unless it may be overwritten."""
    if output.is_dir():
        raise ValueError(f"output: {output} is a folder; give the name of a file")
    if output.exists() and not overwrite:
        raise ValueError(f"output: {output} exists; take another output, or overwrite: true to replace it")


@contextmanager
def locked(lock_file: Path, busy: str) -> Iterator[None]:
    """Hold the lock for the time of the block; the system lets it go when the process ends, however it ends.

    busy: the message of the ValueError that is raised at once where another process holds it. Inside an output folder,
    or beside an output (`lock_file_of`), the lock also holds between users and, on NFS since Linux 2.6.12 and on other
    file systems that support flock, between machines. Where flock is not supported, a warning says so. Folders that are
    made for it go again where nothing came into them.
    """
    missing = [folder for folder in lock_file.absolute().parents if not folder.exists()]
    descriptor = _lock(lock_file, busy)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        if _is_at(descriptor, lock_file):
            lock_file.unlink()  # while it is held: whoever waits for this inode sees that it is gone
        os.close(descriptor)
        with suppress(OSError):  # not empty, or gone
            for folder in missing:
                folder.rmdir()


_held: set[int] = set()


def _leave_locks_to_parent() -> None:
    """A forked process, such as one that loads data, would keep the lock of a parent that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks_to_parent)


def _lock(lock_file: Path, busy: str) -> int:
    """The descriptor that holds the lock."""
    while True:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process that had made the folder removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.warning("%s: this file system has no locks; let nothing else write here", lock_file.parent)
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(busy) from None
            raise
        if _is_at(descriptor, lock_file):
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and locking


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def content_digest(files: Sequence[Path]) -> str:
    """Eight hexadecimal digits for sizes and content of the files, in this order. Above SAMPLED_BLOCKS MiB only that
    many evenly spread blocks of a file are read."""
    crc = 0
    for path in files:
        size = path.stat().st_size
        crc = zlib.crc32(str(size).encode(), crc)
        blocks = -(-size // BLOCK)
        count = min(blocks, SAMPLED_BLOCKS)
        with path.open("rb") as file:
            for place in range(count):
                file.seek(place * blocks // count * BLOCK)
                crc = zlib.crc32(file.read(BLOCK), crc)
    return f"{crc:08x}"


def digest_of(values: Any) -> str:
    """16 hexadecimal digits for anything that JSON can write."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def content_of(path: Path) -> str:
    """A digest of the whole content: of a file, or of a model's folder with the names in it. A process reads it again
    only where a file has changed."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    states = [file.stat() for file in files]
    marks = [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    return _read_content(path, tuple(files), tuple(marks))


@lru_cache(maxsize=64)
def _read_content(path: Path, files: tuple[Path, ...], marks: tuple[tuple[int, ...], ...]) -> str:
    """marks: what changes when a file does."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


class WorkFolder:
    def __init__(self, path: Path):
        self.path = path

    def locked(self) -> AbstractContextManager[None]:
        """To be held while a run works here. Raises ValueError while another does."""
        return locked(self.path / "lock", f"{self.path}: another run works here; wait for it, or set work_dir")

    def stage(self, name: str, made_from: Any, build: Callable[[Path], None], resumes: bool = False) -> Path:
        """The complete folder of a stage, built by `build(partial folder)` unless it is there."""
        folder = self.path / f"{name}-{digest_of([STAGE_VERSION, made_from])}"
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            if not resumes:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            build(partial)
            partial.rename(folder)
        return folder

    def remove(self) -> None:
        """What runs made here; the folder too unless something else is in it."""
        for path in self.path.iterdir():
            if STAGE_NAME.fullmatch(path.name):
                shutil.rmtree(path)
        (self.path / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()
