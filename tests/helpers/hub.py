"""A small Hugging Face hub on localhost, with repositories that want a token and have revisions."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves folders as private models.

    Attributes:
        url: to be given as HF_ENDPOINT.
        requests: (method, path, authorization, bytes sent) of each request, in order.
    """

    def __init__(self, folders: dict[tuple[str, str], Path], token: str) -> None:
        #: By repository and revision.
        self.folders = folders
        self.token = token
        self.requests: list[tuple[str, str, str | None, int]] = []
        self.url = ""

    @staticmethod
    def commit(repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """Folder and commit, by branch or commit."""
        for (name, branch), folder in self.folders.items():
            commit = self.commit(name, branch)
            if name == repo and revision in (branch, commit):
                return folder, commit
        return None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            sent = 0 if self.command == "HEAD" else len(body)
            hub.requests.append((self.command, self.path, self.headers.get("Authorization"), sent))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if sent:
                self.wfile.write(body)

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            asked = self.rfile.read(length)
            path = unquote(urlsplit(self.path).path)
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
                return
            if path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"), asked)
            else:
                self._file(path)

        def _api(self, path: str, asked: bytes) -> None:
            owner, name, *rest = path.split("/")
            action, revision = (rest + ["revision", "main"][len(rest) :])[:2]
            found = hub.find(f"{owner}/{name}", revision)
            if found is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            folder, commit = found
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self._etag(p)}
                for p in sorted(folder.iterdir())
            ]
            if action == "revision":
                siblings = [{"rfilename": file["path"], "size": file["size"]} for file in files]
                self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "private": True, "tags": []})
            elif action == "tree":
                self._json(files)
            elif action == "paths-info":
                wanted = asked.decode()
                self._json([file for file in files if str(file["path"]) in unquote(wanted)])
            else:
                self._send(404, b"{}")

        def _file(self, path: str) -> None:
            owner, name, action, revision, file = path.lstrip("/").split("/", 4)
            found = hub.find(f"{owner}/{name}", revision) if action == "resolve" else None
            if found is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            folder, commit = found
            target = folder / file
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not target.is_file():
                self._send(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
                return
            body, status = target.read_bytes(), 200
            headers |= {"ETag": f'"{self._etag(target)}"', "X-Linked-Size": str(len(body))}
            wanted = self.headers.get("Range")
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or len(body) - 1), len(body) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                body, status = body[start : end + 1], 206
            self._send(status, body, headers)

        @staticmethod
        def _etag(path: Path) -> str:
            return hashlib.sha1(path.read_bytes()).hexdigest()

        do_GET = do_HEAD = do_POST = _answer

    return Handler


@contextmanager
def serve(folders: dict[tuple[str, str], Path], token: str) -> Iterator[Hub]:
    """A running hub; ``folders`` by repository (``owner/name``) and revision."""
    hub = Hub(folders, token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
