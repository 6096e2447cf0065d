"""A hub on this machine: the few routes that huggingface_hub needs to make a repository, to upload and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Repository = dict[str, bytes]  # path to content


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory; every commit replaces the one revision there is.

    Attributes:
        repos: Contents by repository name.
        private: Names of those that were made private.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repository] = {}
        self.private: set[str] = set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        """Stop it."""
        self.shutdown()
        self.server_close()
        self.thread.join()


def revision(files: Repository) -> str:
    """A commit's hash: of what it holds."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _send(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._send({"error": "not found"}, 404, X_Error_Code=code)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(/.+)?)?", path):
            name, kind, below = found.groups()
            if name not in self.server.repos:
                return self._missing("RepoNotFound")
            if below:  # no repository here has folders
                return self._missing("EntryNotFound")
            files = self.server.repos[name]
            if kind == "tree":
                return self._send([_entry(file, content) for file, content in files.items()])
            return self._send({"id": name, "sha": revision(files), "siblings": [{"rfilename": file} for file in files]})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if found is None or found[1] not in self.server.repos:
            return self._missing("RepoNotFound")
        files = self.server.repos[found[1]]
        if found[2] not in files:
            return self._missing("EntryNotFound")
        content = files[found[2]]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": revision(files)}
        return self._send(content, **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "forbidden":
                return self._send({"error": "you may not write here"}, 403)
            if "private" in (asked.get("visibility"), asked.get("private") and "private"):
                self.server.private.add(name)
            self.server.repos.setdefault(name, {})
            return self._send({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        assert found is not None, self.path
        name, kind = found.groups()
        if kind == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = revision(self.server.repos[name])
        return self._send({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})


def _entry(file: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
