"""Files that are written whole or not at all, and hashes of files and values."""

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

LEFTOVER_SECONDS = 3600.0  # age after which no process can still be writing a temporary file


def hash_value(value: object, length: int = 64) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of a JSON-serialisable value, whatever its key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or leave the old one. OSError: it could not be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, remedy: str = "call this again") -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds, and `path` is kept otherwise.

    Raises:
        OSError: the file could not be written; the message ends in `remedy`. Errors without a number are not about
            writing and pass through.
    """
    # Two containers that share the folder can have equal process numbers, so the name is random.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        reason = " ".join((error.strerror or str(error)).split())
        raise OSError(f"{path} could not be written ({reason}): make room and {remedy}.") from error
    finally:
        with suppress(OSError):  # renamed, or never written
            temporary.unlink()


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of killed writes; young ones stay, because another process may be writing them."""
    for left in path.parent.glob(f".{escape(path.name)}.*.part*"):
        with suppress(OSError):  # another process may delete it first
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
