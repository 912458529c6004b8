"""Fetch a Hugging Face hub repository once into a folder: at one commit, with every file verified, and resumable.

huggingface_hub's own download gives the partial file of each process a new name, so an interrupted download starts from
zero. A shard of a large model has gigabytes. This module streams files and resumes at the byte where a download stopped,
also in a later process.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.files import sha256, write_text
from data_prep.hub_errors import explained, http, token
from recipes import json_file
from recipes.errors import PreflightError

_PARTIAL = ".partial"  # in the folder until all files are complete: the commit, and unfinished files
_PARALLEL_FILES = 8  # files downloaded in parallel
_CHUNK = 1 << 20
_TIMEOUT_S = 10.0  # seconds without a byte or without a response
_BACKOFF_S = (1.0, 2.0, 4.0)  # seconds to wait after an attempt that received no byte


@dataclass(frozen=True)
class File:
    """A file as the hub lists it.

    Files in LFS have a SHA-256, which is then the one checked. Other files have only git's SHA-1 of the blob.
    """

    name: str
    size: int  # bytes
    sha256: str | None
    blob: str | None

    @property
    def partial(self) -> str:
        """Return the relative path used during the download: hash and name, because two files may have the same content."""
        return f"{_PARTIAL}/{self.sha256 or self.blob}-{self.name.replace('/', '--')}"

    def proved(self, path: Path) -> str | None:
        """Return the SHA-256 of the file at `path` if it is this file, else None."""
        if path.stat().st_size != self.size:
            return None
        found = sha256(path)
        return found if (found == self.sha256 if self.sha256 else _git_blob(path) == self.blob) else None


@dataclass(frozen=True)
class Repository:
    """A repository and its location on this machine.

    `record` is written once every file is complete and verified: {"id", "commit", "files": {name: {"size", "sha256"}}}.
    """

    id: str
    kind: Literal["model", "dataset"]
    folder: Path
    record: Path
    revision: str | None = None  # a commit, tag or branch; None is the newest commit

    @property
    def _fix(self) -> str:
        return f"remove '{self.record}': the next fetch verifies every file"

    def read(self) -> dict[str, Any] | None:
        """Return the record, or None if the repository has not been fetched completely."""
        return json_file.read_json(self.record, self._fix) if self.record.is_file() else None

    def files(self) -> list[Path] | None:
        """Return the fetched files, or None if any file is missing or has the wrong size."""
        if (record := self.read()) is None:
            return None
        with json_file.shape(self.record, self._fix):
            sizes = {self.folder / name: int(file["size"]) for name, file in record["files"].items()}
        return [*sizes] if all(p.is_file() and p.stat().st_size == size for p, size in sizes.items()) else None


@dataclass(frozen=True)
class Listing:
    """A repository's files at one commit."""

    repository: Repository
    commit: str
    files: list[File]


def listing(repository: Repository) -> Listing:
    """Ask the hub for the repository's files: at the commit of an earlier, interrupted fetch, otherwise at its revision.

    Raise `PreflightError` if the hub or the repository is unavailable.
    """
    # Imported here: a repository that is already fetched must not pay for the import.
    from huggingface_hub import HfApi

    begun = repository.folder / _PARTIAL / "commit"
    commit = begun.read_text(encoding="utf-8") if begun.is_file() else (repository.read() or {}).get("commit")
    commit = commit or repository.revision
    with explained(repository.kind, repository.id):
        api = HfApi(token=token())
        ask = api.model_info if repository.kind == "model" else api.dataset_info
        info = ask(repository.id, revision=commit, files_metadata=True, timeout=_TIMEOUT_S)
    files = [
        File(s.rfilename, s.lfs.size if s.lfs else s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
        # No name may leave the folder or clash with this module's own files.
        if not any(part.startswith((".", "/")) for part in Path(s.rfilename).parts)
    ]
    return Listing(repository, str(info.sha), files)


def download(remote: Listing, files: Sequence[File]) -> dict[str, str]:
    """Fetch the missing files, verify all files, and return their SHA-256 by name.

    Raise `PreflightError` if the disk has too little space, another process is fetching the repository, or the hub does not
    deliver the files. Also raise it if a file differs from the hub's listing; that file is removed.
    """
    folder = remote.repository.folder
    (folder / _PARTIAL).mkdir(parents=True, exist_ok=True)
    _check_room(remote, files)
    write_text(folder / _PARTIAL / "commit", remote.commit)
    stop = threading.Event()
    with (
        _locked(remote.repository),
        _progress(remote.repository.id, files) as advance,
        explained(remote.repository.kind, remote.repository.id),
    ):
        pool = ThreadPoolExecutor(_PARALLEL_FILES)
        work = {pool.submit(_fetch, remote, file, stop, advance): file.name for file in files}
        try:
            return {work[done]: done.result() for done in as_completed(work)}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def write_record(remote: Listing, files: Sequence[File], hashes: dict[str, str]) -> None:
    """Write the record that marks the repository as complete, and remove the partial files."""
    found = {f.name: {"size": f.size, "sha256": hashes[f.name]} for f in sorted(files, key=lambda f: f.name)}
    record = {"id": remote.repository.id, "commit": remote.commit, "files": found}
    write_text(remote.repository.record, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(remote.repository.folder / _PARTIAL)


def _fetch(remote: Listing, file: File, stop: threading.Event, advance: Callable[[int], None]) -> str:
    """Download one file if it is missing, verify it, and return its SHA-256."""
    path = remote.repository.folder / file.name
    if path.is_file() and path.stat().st_size == file.size:
        advance(file.size)
    else:
        partial = remote.repository.folder / file.partial
        _stream(remote, file, partial, stop, advance)
        path.parent.mkdir(exist_ok=True, parents=True)
        partial.rename(path)
    if (found := file.proved(path)) is None:
        path.unlink()
        raise PreflightError(
            f"{file.name} of {remote.repository.id} is not the file that the hub lists ({file.size:,} bytes, hash "
            f"{file.sha256 or file.blob})",
            "it was removed, and the same command fetches it again",
        )
    return found


def _stream(remote: Listing, file: File, partial: Path, stop: threading.Event, advance: Callable[[int], None]) -> None:
    """Append to the partial file until it has its full size. Reconnect after a broken connection."""
    partial.touch()
    received = partial.stat().st_size
    advance(min(received, file.size))
    failed = 0  # consecutive attempts that received nothing
    while received < file.size:
        try:
            _append(remote, file, partial, stop, advance)
        except http().TransportError:
            failed = 0 if partial.stat().st_size > received else failed + 1
            if failed > len(_BACKOFF_S) or stop.wait(_BACKOFF_S[max(failed - 1, 0)]):
                raise
        received = partial.stat().st_size


def _append(remote: Listing, file: File, partial: Path, stop: threading.Event, advance: Callable[[int], None]) -> None:
    """Request the missing bytes once and write them as they arrive."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    repository, received = remote.repository, partial.stat().st_size
    url = hf_hub_url(
        repository.id, file.name, repo_type=repository.kind, revision=remote.commit, endpoint=HfApi().endpoint
    )
    # Uncompressed: a range counts bytes of the file itself.
    wanted = {"Range": f"bytes={received}-", "Accept-Encoding": "identity"}
    headers = build_hf_headers(token=token(), headers=wanted)
    with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S, retry_on_exceptions=()) as answer:
        hf_raise_for_status(answer)
        whole = answer.status_code != 206  # the server ignores ranges and sends the whole file
        if whole:
            advance(-received)
        with partial.open("wb" if whole else "ab") as out:
            for chunk in answer.iter_bytes(_CHUNK):
                if stop.is_set():
                    raise CancelledError
                out.write(chunk)
                advance(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if partial.stat().st_size < file.size:
        raise http().RemoteProtocolError(f"the download of {file.name} ended early")


def _check_room(remote: Listing, files: Sequence[File]) -> None:
    folder = remote.repository.folder
    paths = [folder / name for f in files for name in (f.name, f.partial)]
    held = sum(p.stat().st_size for p in paths if p.is_file())
    needed, free = sum(f.size for f in files) - held, shutil.disk_usage(folder).free
    if free < needed:
        raise PreflightError(
            f"'{folder}' has {free / 1e9:,.2f} GB free and {remote.repository.id} needs {needed / 1e9:,.2f} GB more",
            "make room there or write cluster.root=FOLDER on another disk",
        )


@contextmanager
def _locked(repository: Repository) -> Iterator[None]:
    with (repository.folder / _PARTIAL / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreflightError(
                f"another process is fetching {repository.id} into '{repository.folder}'", "wait for it"
            ) from error
        yield


@contextmanager
def _progress(title: str, files: Sequence[File]) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn(title, markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(f.size for f in files))
        yield lambda n: progress.advance(task, n)


def _git_blob(path: Path) -> str:
    """Return git's SHA-1 name of the blob. Files outside LFS are small enough to read at once."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
