"""A W&B server on 127.0.0.1, as far as runs need one: it answers what W&B's client sends and keeps all of it.

What the real server answers is in no public schema; the fields are those that the queries in wandb-core ask for.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

ENTITY = "somebody"
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Run:
    """What the server was told of a run."""

    upserts: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)

    def told(self, name: str) -> Any:
        """The last value of an argument of ``upsertBucket``."""
        return next((upsert[name] for upsert in reversed(self.upserts) if upsert.get(name) is not None), None)

    @property
    def config(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in json.loads(self.told("config")).items() if name != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        found = self.lines.get("wandb-summary.json", {})
        return json.loads(found[max(found)]) if found else {}


@dataclass
class Artifact:
    """A version of an artifact: of which type and name, its files, and which run made it."""

    kind: str
    name: str
    digest: str
    run: str
    metadata: dict[str, Any]
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


class Server:
    """
    Attributes:
        runs: by id.
        artifacts: by the server's id for them.
        used: (run's id, artifact's id) of every artifact that a run said to use.
        asked: the names of all GraphQL operations, in order.
        keys: the keys that came with requests.
        failures: tracebacks of what could not be answered.
        until: the operation at which the server vanishes; it takes connections and drops them.
        vanished: whether it has.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.used: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.keys: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.clients: dict[str, str] = {}
        self.lock = threading.Lock()
        self.failures: list[str] = []
        self.until: str | None = None
        self.vanished = False
        self.http = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    # --- GraphQL ---

    def answer(self, query: str, given: Mapping[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else "?"
        self.asked.append(name)
        answer = getattr(self, f"_{name}", None)
        return {"data": answer(given)} if answer else {"errors": [{"message": f"{name} is not known here"}]}

    def _Viewer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        viewer = {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "email": None, "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, given: Mapping[str, Any]) -> dict[str, Any]:
        new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run())
        run.upserts.append(dict(given))
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}}
        bucket = {
            "id": f"bucket-{given['name']}", "name": given["name"], "displayName": run.told("displayName"),
            "description": None, "config": run.told("config"), "sweepName": run.told("sweep"), "project": project,
            "historyLineCount": len(run.history),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _RunResumeStatus(self, given: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = None
        if run is not None:
            counts = {name: len(run.lines.get(file, {})) for name, file in (
                ("historyLineCount", "wandb-history.jsonl"), ("eventsLineCount", "wandb-events.jsonl"),
                ("logLineCount", "output.log"))}  # fmt: skip
            tail = [json.dumps(row) for row in run.history[-1:]]
            bucket = {
                "id": f"bucket-{given['name']}", "name": given["name"], "displayName": run.told("displayName"),
                "summaryMetrics": json.dumps(run.summary), "config": run.told("config"), "tags": run.told("tags"),
                "notes": None, "historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": '{"t": 1}', **counts,
            }  # fmt: skip
        entity = {"id": "e", "name": ENTITY}
        return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}

    def _CreateRunFiles(self, given: Mapping[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/files/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    # --- artifacts ---

    def _CreateArtifact(self, given: Mapping[str, Any]) -> dict[str, Any]:
        new = given["input"]
        sequence = (new["artifactTypeName"], new["artifactCollectionName"])
        versions = [id for id, a in self.artifacts.items() if (a.kind, a.name) == sequence and a.committed]
        same = [id for id in versions if self.artifacts[id].digest == new["digest"]]
        identifier = same[0] if same else f"artifact-{len(self.artifacts)}"
        if not same:
            about = json.loads(new.get("metadata") or "{}")
            self.artifacts[identifier] = Artifact(*sequence, new["digest"], new.get("runName", ""), about)
        self.clients[new["clientID"]] = identifier
        latest = {"latestArtifact": {"id": versions[-1]} if versions else None}
        state = "COMMITTED" if same else "PENDING"
        return {"createArtifact": {"artifact": {"id": identifier, "state": state, "artifactSequence": latest}}}

    def _CreateArtifactManifest(self, given: Mapping[str, Any]) -> dict[str, Any]:
        file = {"id": "file", "uploadUrl": f"{self.url}/manifest/{given['artifactID']}", "uploadHeaders": []}
        manifest = {"id": f"manifest-{given['artifactID']}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _UpdateArtifactManifest(self, given: Mapping[str, Any]) -> dict[str, Any]:
        identifier = given["artifactManifestID"].removeprefix("manifest-")
        file = {"id": "file", "uploadUrl": f"{self.url}/manifest/{identifier}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": given["artifactManifestID"], "file": file}}}

    def _CreateArtifactFiles(self, given: Mapping[str, Any]) -> dict[str, Any]:
        edges = []
        for file in given["input"]["artifactFiles"]:
            place = f"{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": place, "uploadUrl": f"{self.url}/artifacts/{place}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, given: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[given["artifactID"]]
        manifest = json.loads(self.uploads[f"/manifest/{given['artifactID']}"])
        for name, entry in manifest["contents"].items():
            artifact.files[name] = self.uploads[f"/artifacts/{given['artifactID']}/{name}"]
            assert int(entry["size"]) == len(artifact.files[name])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": artifact.digest}}}

    def _UseArtifact(self, given: Mapping[str, Any]) -> dict[str, Any]:
        self.used.append((given["input"]["runName"], given["input"]["artifactID"]))
        return {"useArtifact": {"artifact": {"id": given["input"]["artifactID"]}}}

    def _ClientIDMapping(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"clientIDMapping": {"serverID": self.clients[given["clientID"]]}}

    # --- what is no GraphQL ---

    def stream(self, run: str, sent: Mapping[str, Any]) -> None:
        """Lines of a run's history, summary, events and output, by their places."""
        known = self.runs[run]
        for name, chunk in (sent.get("files") or {}).items():
            lines = known.lines.setdefault(name, {})
            for place, line in enumerate(chunk["content"], chunk["offset"]):
                lines[place] = line
        if sent.get("complete"):
            known.ended.append(sent.get("exitcode"))

    def take(self, path: str, content: bytes) -> None:
        """A file that was uploaded."""
        kind, run, name = path.removeprefix("/").split("/", 2) if path.count("/") > 2 else ("", "", "")
        if kind == "files":
            self.runs[run].files[unquote(name)] = content
        else:
            self.uploads[unquote(path)] = content


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that end in the middle of a connection are no errors."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def parse_request(self) -> bool:
            if server.vanished:
                self.close_connection = True
                return False
            return super().parse_request()

        def _content(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            sent = json.loads(self._content() or "{}")
            if authorised := self.headers.get("Authorization"):
                kind, _, secret = authorised.partition(" ")
                server.keys.add(base64.b64decode(secret).decode().removeprefix("api:") if kind == "Basic" else secret)
            path = urlparse(self.path).path
            try:
                with server.lock:
                    if path.endswith("/graphql"):
                        answer = server.answer(sent["query"], sent.get("variables") or {})
                        server.vanished |= server.asked[-1] == server.until
                    elif path.endswith("/file_stream"):
                        server.stream(path.removesuffix("/file_stream").rpartition("/")[2], sent)
                        answer = {"exitcode": None, "limits": {}}
                    else:  # the client's own statistics
                        answer = {}
                self._send(answer)
            except Exception:
                server.failures.append(traceback.format_exc())
                self._send({}, 400)

        def do_PUT(self) -> None:
            content = self._content()
            with server.lock:
                server.take(urlparse(self.path).path, content)
            self._send({})

    return Handler


@contextmanager
def serving() -> Iterator[Server]:
    """Within, a server that answers."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
