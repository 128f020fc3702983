"""Executables that report llama-server's timings at speeds that a test chooses, and compute nothing."""

import sys
from pathlib import Path

#: Does not import promptai: a comparison starts it a dozen times.
_TEXT = """#!{python} -SE
import json, sys

if "--port" not in sys.argv:
    print("" if "--help" in sys.argv else "build 7 (abc) with cc\\nsystem_info: CPU : SSE3 = 1 |")
    sys.exit(1)
if {breaks}:
    sys.exit("error: invalid argument: --cache-ram")
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({{"status": "ok"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer({{"tokens": [len(word) for word in body["content"].split()]}})
        prompt, tokens = len(body["prompt"]), body["n_predict"]
        assert body["cache_prompt"] is False and body["ignore_eos"] is True
        ms = {{"prompt_ms": prompt / {prefill} * 1000, "predicted_ms": (tokens - 1) / {decode} * 1000}}
        self.answer({{"content": "", "timings": {{"prompt_n": prompt, "predicted_n": tokens, "cache_n": 0, **ms}}}})

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def write_fake_engine(path: Path, *, prefill: float, decode: float, breaks: bool = False) -> Path:
    """Write a llama-server with these rates; with ``breaks`` it exits as soon as it should serve a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEXT.format(python=sys.executable, prefill=prefill, decode=decode, breaks=breaks))
    path.chmod(0o755)
    return path
