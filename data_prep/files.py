"""Files and folders that are whole or absent: written under a temporary name, synced, renamed."""

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

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path in the error of a full disk, which says where only when a file is opened, and which libraries in Rust quote in
    errors of their own."""
    try:
        yield
    except LimiError:
        raise
    except Exception as error:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
        if code not in _NO_ROOM or getattr(error, "filename", None) is not None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends without an error, and is removed
    otherwise. Where another process made `target` in the meantime, theirs stays."""
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
    """Flushes every file and folder under `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: readers see the old text or the new one."""
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
