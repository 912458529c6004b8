"""Write files and folders atomically: under a temporary name, then synced, then renamed."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recipes.errors import LimiError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the path to a disk-full error raised in the block.

    The operating system names the path only when opening a file fails. Libraries in Rust quote the error in exceptions of
    their own.
    """
    try:
        yield
    except LimiError:
        raise
    except Exception as error:
        os_error = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(os_error[1]) if os_error else None
        if code not in _DISK_FULL or getattr(error, "filename", None) is not None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder next to `target`.

    It becomes `target` if the block ends without an error; otherwise it is removed. If another process created `target`
    in the meantime, that folder remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with writing(target):
            yield scratch
            scratch.chmod(0o755)
            sync_tree(scratch)
        try:
            scratch.rename(target)
            _sync(target.parent)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see either the old text or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path), scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
