"""A server on this machine that answers as W&B's does, from a file of answers by query."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.paths import TESTS

RECORDED = TESTS / "helpers" / "recorded"
KEY = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(answers):
    """Yields the environment that leads W&B's client to the server, and the list of what was asked so far.

    Args:
        answers: by GraphQL operation, its ``data``, or by the value of one of its variables, under ``of``; ``files`` by
            path; ``status`` for an answer of that number to everything. ``{server}`` stands for the address.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path != "/graphql":  # the client's own statistics
                return self.answer(200, b"{}")
            query = json.loads(body)
            name = re.search(r"\b(?:query|mutation)\s+(\w+)", query["query"])[1]
            asked.append((name, query.get("variables") or {}))
            content = answers["graphql"][name]
            if "of" in content:
                content = content["answers"][asked[-1][1][content["of"]] or ""]
            self.answer(answers.get("status", 200), json.dumps(content).replace("{server}", address).encode())

        def do_GET(self):
            asked.append(("GET", {"path": self.path}))
            content = answers["files"].get(self.path)
            self.answer(404 if content is None else 200, (content or "").encode())

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_SILENT": "true"}, asked
        finally:
            server.shutdown()


def python(arguments, folder, environment):
    """Runs Python with no other key than the environment's, as a process, since W&B's client keeps its settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**kept, "HOME": str(folder), **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def recorded(name):
    return json.loads((RECORDED / f"{name}.json").read_text())
