"""Repositories of the Hugging Face hub, each fetched once into a folder: at one commit, every file proved, resumable.

huggingface_hub's own download gives every process's partial file a new name, so what was interrupted starts anew. A shard
of a large model is gigabytes: files are streamed here, and go on at the byte where they stopped, in a later process too.
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
from data_prep.hub_errors import explained, token
from recipes import json_file
from recipes.errors import PreflightError

_PARTIAL = ".partial"  # in the folder, until all is whole: the commit, and unfinished files
_TOGETHER = 8  # files at a time
_CHUNK = 1 << 20
_SILENCE = 10.0  # seconds without a byte, or for an answer
_WAITS = (1.0, 2.0, 4.0)  # seconds before each new attempt at a file that got no byte in the one before


@dataclass(frozen=True)
class File:
    """What the hub says of a file. Exactly one hash: SHA-256 where it lies in LFS, git's SHA-1 of the blob otherwise."""

    name: str
    size: int  # bytes
    sha256: str | None
    blob: str | None

    @property
    def partial(self) -> str:
        """Where it is while it comes: hash and name, as two files may have the same content."""
        return f"{_PARTIAL}/{self.sha256 or self.blob}-{self.name.replace('/', '--')}"

    def proved(self, path: Path) -> str | None:
        """The SHA-256 of the file on the disk where it is this one, None where it is another."""
        if path.stat().st_size != self.size:
            return None
        found = sha256(path)
        return found if (found == self.sha256 if self.sha256 else _git_blob(path) == self.blob) else None


@dataclass(frozen=True)
class Repository:
    """A repository and its place on this machine. `record` is written when every file is whole and proved:
    {"id", "commit", "files": {name: {"size", "sha256"}}}."""

    id: str
    kind: Literal["model", "dataset"]
    folder: Path
    record: Path

    @property
    def _again(self) -> str:
        return f"remove '{self.record}': the next fetch proves every file anew"

    def read(self) -> dict[str, Any] | None:
        """The record, or None where the repository has not been fetched whole."""
        return json_file.read(self.record, self._again) if self.record.is_file() else None

    def files(self) -> list[Path] | None:
        """What was fetched, or None where it is not whole; a file that went missing or was cut since is seen."""
        if (record := self.read()) is None:
            return None
        with json_file.shape(self.record, self._again):
            sizes = {self.folder / name: int(file["size"]) for name, file in record["files"].items()}
        return [*sizes] if all(p.is_file() and p.stat().st_size == size for p, size in sizes.items()) else None


@dataclass(frozen=True)
class Listing:
    """A repository's files at one commit."""

    repository: Repository
    commit: str
    files: list[File]


def listing(repository: Repository) -> Listing:
    """Asks the hub for its files: at the commit that an earlier, interrupted fetch began with, at the newest otherwise.

    Raises `PreflightError` where the hub, or this repository, cannot be had.
    """
    # Here, not at the top: what was fetched before must not pay for it.
    from huggingface_hub import HfApi

    begun = repository.folder / _PARTIAL / "commit"
    commit = begun.read_text(encoding="utf-8") if begun.is_file() else (repository.read() or {}).get("commit")
    with explained(repository.kind, repository.id):
        api = HfApi(token=token())
        ask = api.model_info if repository.kind == "model" else api.dataset_info
        info = ask(repository.id, revision=commit, files_metadata=True, timeout=_SILENCE)
    files = [
        File(s.rfilename, s.lfs.size if s.lfs else s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
        # None leaves the folder, and none is taken for this module's own.
        if not any(part.startswith((".", "/")) for part in Path(s.rfilename).parts)
    ]
    return Listing(repository, str(info.sha), files)


def download(there: Listing, files: Sequence[File]) -> dict[str, str]:
    """Fetches what is missing of these files and proves all; their SHA-256 by name.

    Raises `PreflightError` where the disk has no room for them, where another process is at it, where the hub does not give
    them, and where a file is not the one that the hub lists; that one is removed.
    """
    folder = there.repository.folder
    (folder / _PARTIAL).mkdir(parents=True, exist_ok=True)
    _check_room(there, files)
    write_text(folder / _PARTIAL / "commit", there.commit)
    stop = threading.Event()
    with (
        _locked(there.repository),
        _progress(there.repository.id, files) as advance,
        explained(there.repository.kind, there.repository.id),
    ):
        pool = ThreadPoolExecutor(_TOGETHER)
        work = {pool.submit(_fetch, there, file, stop, advance): file.name for file in files}
        try:
            return {work[done]: done.result() for done in as_completed(work)}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def write_record(there: Listing, files: Sequence[File], hashes: dict[str, str]) -> None:
    """Says that the repository is whole."""
    found = {f.name: {"size": f.size, "sha256": hashes[f.name]} for f in sorted(files, key=lambda f: f.name)}
    record = {"id": there.repository.id, "commit": there.commit, "files": found}
    write_text(there.repository.record, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(there.repository.folder / _PARTIAL)


def _fetch(there: Listing, file: File, stop: threading.Event, advance: Callable[[int], None]) -> str:
    """Makes one file whole; its SHA-256."""
    path = there.repository.folder / file.name
    if path.is_file() and path.stat().st_size == file.size:
        advance(file.size)
    else:
        partial = there.repository.folder / file.partial
        _stream(there, file, partial, stop, advance)
        path.parent.mkdir(exist_ok=True, parents=True)
        partial.rename(path)
    if (found := file.proved(path)) is None:
        path.unlink()
        raise PreflightError(
            f"{file.name} of {there.repository.id} is not the file that the hub lists ({file.size:,} bytes, hash "
            f"{file.sha256 or file.blob})",
            "it was removed, and the same command fetches it again",
        )
    return found


def _stream(there: Listing, file: File, partial: Path, stop: threading.Event, advance: Callable[[int], None]) -> None:
    """Appends to the partial file until it has its size; a connection that breaks is opened again."""
    from httpx2 import TransportError

    partial.touch()
    had = partial.stat().st_size
    advance(min(had, file.size))
    failed = 0  # attempts in a row that got nothing
    while had < file.size:
        try:
            _append(there, file, partial, stop, advance)
        except TransportError:
            failed = 0 if partial.stat().st_size > had else failed + 1
            if failed > len(_WAITS) or stop.wait(_WAITS[max(failed - 1, 0)]):
                raise
        had = partial.stat().st_size


def _append(there: Listing, file: File, partial: Path, stop: threading.Event, advance: Callable[[int], None]) -> None:
    """One request for what is missing, written as it comes."""
    from httpx2 import RemoteProtocolError
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    repository, had = there.repository, partial.stat().st_size
    url = hf_hub_url(
        repository.id, file.name, repo_type=repository.kind, revision=there.commit, endpoint=HfApi().endpoint
    )
    # Not compressed: a range counts bytes of the file itself.
    wanted = {"Range": f"bytes={had}-", "Accept-Encoding": "identity"}
    headers = build_hf_headers(token=token(), headers=wanted)
    with http_stream_backoff("GET", url, headers=headers, timeout=_SILENCE, retry_on_exceptions=()) as answer:
        hf_raise_for_status(answer)
        whole = answer.status_code != 206  # the server does not know ranges and sends all of it
        if whole:
            advance(-had)
        with partial.open("wb" if whole else "ab") as out:
            for chunk in answer.iter_bytes(_CHUNK):
                if stop.is_set():
                    raise CancelledError
                out.write(chunk)
                advance(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if partial.stat().st_size < file.size:
        raise RemoteProtocolError(f"the answer for {file.name} ended early")


def _check_room(there: Listing, files: Sequence[File]) -> None:
    folder = there.repository.folder
    at = [folder / name for f in files for name in (f.name, f.partial)]
    held = sum(p.stat().st_size for p in at if p.is_file())
    needed, free = sum(f.size for f in files) - held, shutil.disk_usage(folder).free
    if free < needed:
        raise PreflightError(
            f"'{folder}' has {free / 1e9:,.2f} GB free and {there.repository.id} needs {needed / 1e9:,.2f} GB more",
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
    """What git names the file by; files outside LFS are small."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
