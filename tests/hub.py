"""The Hugging Face hub, played by a server on loopback: what huggingface_hub and `data_prep/hub.py` ask of it.

Files in LFS are redirected to another origin, as the hub's are, which knows byte ranges.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "a" * 40


@dataclass
class Repo:
    files: dict[str, bytes]
    commits: list[str] = field(default_factory=lambda: [COMMIT])  # the last is the newest
    sizes: dict[str, int] = field(default_factory=dict)  # that the listing claims
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and error code of files
    spoiled: set[str] = field(default_factory=set)  # sent with a byte changed
    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes after which each coming answer breaks off
    stalled: dict[str, int] = field(default_factory=dict)  # bytes after which answers say nothing more

    def listing(self, commit: str) -> dict:
        def sibling(name: str, content: bytes) -> dict:
            size = self.sizes.get(name, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            return {"rfilename": name, "size": size, "blobId": blob} | ({"lfs": lfs} if is_large(name) else {})

        return {"id": "x", "sha": commit, "siblings": [sibling(n, c) for n, c in self.files.items()]}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class Hub:
    """`repos` by "models/ORG/NAME" and "datasets/ORG/NAME". `sent` counts each file's bytes; `asked` are
    (host, path, whether a token came with it)."""

    def __init__(self, token: str | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.token, self.down = token, False
        self.sent: Counter[str] = Counter()
        self.asked: list[tuple[str, str, bool]] = []
        self.stop, self.stalling = threading.Event(), threading.Event()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}/store"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the hub's place in this process, where huggingface_hub has read its address already."""
        from huggingface_hub import constants

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Says nothing of clients that hang up: the command may be called in this process, whose stderr is then the command's."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if hub.down:
            self.close_connection = True
            return
        hub.asked.append((self.headers["Host"], path, self.headers["Authorization"] is not None))
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/(\w+))?", path):
            self.list(*found.groups())
        elif found := re.fullmatch(r"/(store/)?(?:(datasets)/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            stored, kind, name, _, file = found.groups()
            self.give(hub.repos[f"{kind or 'models'}/{name}"], file, stored is not None)
        else:
            self.answer(404)

    def list(self, name: str, commit: str | None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            # The hub tells nobody without a token whether there is such a repository.
            self.answer(404 if self.headers["Authorization"] else 401, {"X-Error-Code": "RepoNotFound"})
        elif commit and commit not in repo.commits:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(200, {}, json.dumps(repo.listing(commit or repo.commits[-1])).encode())

    def give(self, repo: Repo, name: str, stored: bool) -> None:
        if is_large(name) and not stored:
            self.answer(302, {"Location": self.hub.store + self.path + "?Signature=SIGNED"})
        elif name in repo.refused:
            self.answer(repo.refused[name][0], {"X-Error-Code": repo.refused[name][1]})
        elif name not in repo.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        else:
            content = repo.files[name]
            if name in repo.spoiled:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_file(repo, name, content)

    def send_file(self, repo: Repo, name: str, content: bytes) -> None:
        range_ = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(range_[1]) if range_ else 0
        self.send_response(206 if range_ else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cuts = repo.cut.get(name)
        end = cuts.pop(0) if cuts else repo.stalled.get(name, len(content))
        self.wfile.write(content[start:end])
        self.wfile.flush()
        self.hub.sent[name] += max(end - start, 0)
        if name in repo.stalled:
            self.hub.stalling.set()
            self.hub.stop.wait(30)
        self.close_connection = True

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
