"""Started in SGLang's place by the tests: healthy, and then as faulty as its second word says. Words: port, fault, and the
one path that the fault is of, where all others answer as SGLang does, for a model that always says `ok`."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INFO = {
    "/model_info": {"architectures": ["Qwen3ForCausalLM"]},
    "/server_info": {"version": "0.5.23", "dtype": "float32", "max_total_num_tokens": 65536, "max_req_input_len": 8000},
}


def as_sglang(path, body):
    if path == "/generate":
        start = body["logprob_start_len"]
        entries = [[-1.0 if n else None, token, None] for n, token in enumerate(body["input_ids"][start:])]
        return {"meta_info": {"input_token_logprobs": entries}}
    choice = {"message": {"content": "ok"}, "finish_reason": "stop", "prompt_token_ids": [0]}
    return {
        "/v1/chat/completions": {"choices": [choice]},
        "/tokenize": {"tokens": [0]},
        "/parse_function_call": {"calls": []},
        "/separate_reasoning": {"reasoning_text": None},
        "/update_weights_from_disk": {"success": True},
    }[path]


SLOW_S = 7.0  # longer than tests let a server be silent


class Handler(BaseHTTPRequestHandler):
    fault, only, working = "", None, False
    one_at_a_time = threading.Lock()

    def do_GET(self):
        if self.fault == "unhealthy":
            self.say(503, b"")
        elif self.path == "/v1/loads":
            tokens = int(10 * time.monotonic()) if Handler.working else 7
            self.say(200, json.dumps({"loads": [{"timestamp": time.time(), "num_used_tokens": tokens}]}).encode())
        elif self.only == self.path:
            getattr(self, self.fault)()
        else:
            self.say(200, json.dumps(INFO.get(self.path, {"get": True})).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.only in (None, self.path):
            getattr(self, self.fault)()
        else:
            self.say(200, json.dumps(as_sglang(self.path, body)).encode())

    def log_message(self, *_):
        pass

    def say(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def writes(self):
        self.good()

    computes = writes

    def good(self):
        self.say(200, json.dumps({"pid": os.getpid()}).encode())

    def slow(self):
        """A long answer, of which the server's figures alone tell that it is on its way."""
        Handler.working = True
        time.sleep(SLOW_S)
        Handler.working = False
        self.good()

    def trickle(self):
        """A byte at a time."""
        content = json.dumps({"pid": os.getpid()}).encode().ljust(14)
        self.send_response(200)
        self.end_headers()
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(SLOW_S / len(content))

    def queue(self):
        with self.one_at_a_time:
            time.sleep(1.0)
        self.good()

    def slow_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for n in range(int(SLOW_S)):
            self.wfile.write(b'data: {"n": %d}\n\n' % n)
            self.wfile.flush()
            time.sleep(1.0)
        self.wfile.write(b"data: [DONE]\n\n")

    def error(self):
        self.say(500, b'{"message": "out of memory in layer 7"}')

    def refused(self):
        self.say(400, b'{"message": "no such field"}')

    def other_shape(self):
        self.say(200, b'{"answer": 42}')

    def redirect(self):
        self.send_response(307)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def no_json(self):
        self.say(200, b"<html>a proxy's page</html>")

    def half(self):
        """Fewer bytes than it said."""
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b'{"text": "a')

    def hang(self):
        time.sleep(600)

    def drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(300):
            self.wfile.write(b" ")
            time.sleep(0.1)

    def die(self):
        print("CUDA error: an illegal memory access", flush=True)
        os._exit(7)

    def stream(self):
        self.events(b"[DONE]")

    def cut(self):
        self.events()

    def stream_error(self):
        self.events(b'{"error": {"message": "the scheduler is gone"}}', b"[DONE]")

    def stream_die(self):
        self.events()
        self.die()

    def stream_hang(self):
        self.events()
        self.wfile.flush()
        time.sleep(600)

    def events(self, *last):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for data in (b'{"n": 1}', b'{"n": 2}', *last):
            self.wfile.write(b"data: " + data + b"\n\n")
        self.wfile.flush()


def spin():
    while True:
        pass


def main(port, fault, only=None):
    wait = "import time; time.sleep(600)"
    # As a server may have them: of its process group, of a group of its own, deaf to SIGTERM, of a session of its own.
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + wait
    children = [
        subprocess.Popen([sys.executable, "-c", wait]),
        subprocess.Popen([sys.executable, "-c", wait], process_group=0),
        subprocess.Popen([sys.executable, "-c", deaf]),
    ]
    if "die" not in fault:  # an orphan of another session would be nobody's
        children.append(subprocess.Popen([sys.executable, "-c", wait], start_new_session=True))
    print("children", *[child.pid for child in children], flush=True)
    if fault == "never_up":
        time.sleep(600)
    ready = time.monotonic() + SLOW_S
    while fault == "writes" and time.monotonic() < ready:
        print("Loading safetensors checkpoint shards", flush=True)
        time.sleep(0.5)
    while fault == "computes" and time.monotonic() < ready:
        pass
    if fault == "stays_silent":  # listens, and accepts nothing
        with socket.create_server(("127.0.0.1", port)):
            time.sleep(600)
    if fault == "unhealthy":  # at work on nothing, as a scheduler that polls
        threading.Thread(target=spin, daemon=True).start()
    Handler.fault, Handler.only = fault, only
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
