"""A hub on this machine: enough of the HTTP interface to push a small repository and to fetch it.

Files are kept in memory. Supported: creating a repository, asking for the upload mode of
files, a commit with inline files, the list of files of a revision, and downloading one.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class TinyHub:
    """Repositories that were pushed, and the requests received."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def run_tiny_hub() -> Iterator[TinyHub]:
    """Serve an empty hub on a free port of this machine until the end of the block."""
    hub = TinyHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: TinyHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts()
        if parts == ["api", "repos", "create"]:
            document = json.loads(content)
            name = "/".join(filter(None, [document.get("organization"), document["name"]]))
            self.served.repositories.setdefault(name, {})
            self._send_json({"url": f"{self.served.url}/{name}"})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = json.loads(content)["files"]
            answers = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self._send_json({"files": [{**answer, "shouldIgnore": False} for answer in answers]})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            name = "/".join(parts[2:4])
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    assert value["encoding"] == "base64"
                    self.served.repositories[name][value["path"]] = base64.b64decode(
                        value["content"]
                    )
            url = f"{self.served.url}/{name}/commit/{COMMIT}"
            self._send_json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        elif parts == ["api", "validate-yaml"]:
            self._send_json({"errors": [], "warnings": []})
        else:
            self._send_missing("EntryNotFound")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = self._parts()
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        files = self.served.repositories.get(name)
        if files is None:
            self._send_missing("RepoNotFound")
        elif is_api and "tree" in parts:
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
                for path, content in files.items()
            ]
            self._send_json(tree)
        elif is_api:
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[4:]) in files:
            content = files["/".join(parts[4:])]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'}
            self._send(200, content, headers)
        else:
            self._send_missing("EntryNotFound")

    def _parts(self) -> list[str]:
        path = self.path.partition("?")[0]
        self.served.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send_missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        # An open connection would be served when the hub is gone.
        ends = {"Content-Length": str(len(content)), "Connection": "close"}
        for key, value in {**headers, **ends}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; requests are kept in the hub."""


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
