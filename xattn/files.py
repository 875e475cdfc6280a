"""Files that are written whole or not at all, and hashes of files and values."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room")
REMEDIES[errno.ENAMETOOLONG] = "shorten the path"
LEFTOVER_SECONDS = 3600.0  # age after which no process can still be writing a temporary file


def hash_value(value: object, length: int = 64) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of a JSON-serialisable value, whatever its key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes, tail: str = " and call this again") -> None:
    """Write a file completely or leave the old one. OSError: see `replacing`."""
    with replacing(path, tail) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, tail: str = " and call this again") -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds, and `path` is kept otherwise.

    OSError: see `writing`.
    """
    # Two containers that share the folder can have equal process numbers, so the name is random.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    try:
        with writing(path, tail):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # renamed, or never written
            temporary.unlink()


@contextmanager
def writing(path: Path, tail: str = " and call this again") -> Iterator[None]:
    """Explain an OSError of the block in one sentence.

    Raises:
        OSError: the file or folder could not be written; the message says why and what to do, and ends in `tail`.
            Errors without a number are not about writing and pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path} could not be written{_obstacle(path, error)}{tail}.") from error


def _obstacle(path: Path, error: OSError) -> str:
    """Why a file could not be written, and what to do about it."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            ", because you have no permission to write there: change the permissions of its folder or choose another "
            "folder"
        )
    if error.errno == errno.EROFS:
        return ", because it is on a read-only file system: choose another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        for folder in path.parents:
            if os.path.exists(folder) and not os.path.isdir(folder):
                return f", because {folder} is a file where a folder is needed: rename that file"
    if error.errno == errno.EISDIR:
        return ", because it is a folder: rename that folder"
    reason = " ".join((error.strerror or str(error)).split())
    return f" ({reason}): {REMEDIES.get(error.errno, 'check its folder and the disk')}"


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of killed writes; young ones stay, because another process may be writing them."""
    for left in path.parent.glob(f".{escape(path.name)}.*.part*"):
        with suppress(OSError):  # another process may delete it first
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
