"""A data set on the hub, played by a server on loopback that answers as the hub's API does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep import fetch
from recipes.errors import DataError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = {"limi.json": b"[]", "README.md": b"x"}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            name = self.path.rpartition("/")[2].partition("?")[0]
            if self.path.startswith("/api/datasets/GAIR/LIMI"):
                siblings = [{"rfilename": n} for n in files]
                content = json.dumps({"id": "GAIR/LIMI", "sha": "a" * 40, "siblings": siblings}).encode()
            elif "/resolve/" in self.path and name in files:
                content = files[name]
            else:
                self.send_response(404)
                self.end_headers()
                return
            self.send_response(200)
            for header, value in (
                ("ETag", f'"{name}1"'),
                ("X-Repo-Commit", "a" * 40),
                ("Content-Length", str(len(content))),
            ):
                self.send_header(header, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub.constants as constants
    from huggingface_hub import HfApi

    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(HfApi.__init__, "__defaults__", (endpoint, *HfApi.__init__.__defaults__[1:]))
    yield files
    server.shutdown()


def test_a_local_path_is_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    assert fetch.local(str(path)) == path


@pytest.mark.parametrize("path", ["none.jsonl", "/no/such/file", "a/b/c", "../x/y", ""])
def test_what_is_neither_a_file_nor_an_id_is_refused(path):
    with pytest.raises(DataError, match=r"data\.path=FILE"):
        fetch.local(path)


def test_the_one_json_file_of_a_hub_data_set_is_fetched(hub):
    assert fetch.local("GAIR/LIMI").read_bytes() == b"[]"


def test_two_json_files_are_not_guessed_between(hub):
    hub["other.jsonl"] = b""
    with pytest.raises(DataError, match=r"2 JSON files \(limi\.json, other\.jsonl\)"):
        fetch.local("GAIR/LIMI")


def test_an_unknown_data_set_is_refused(hub):
    with pytest.raises(DataError, match=r"'GAIR/NONE' is no local file"):
        fetch.local("GAIR/NONE")
