"""A stand-in of the Hugging Face Hub on loopback: the few requests that snapshot_download makes.

Repositories are folders: `ok/*` are served; the names below decide what else is answered.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class HubStandIn:
    """Serves one folder as the files of every repository whose name is not special.

    Args:
        folder: the files.
        extra_names: names listed in the tree besides the files (hostile ones).
        cut_after: bytes of a file over 15 MB after which the connection is cut, the first time only.
    """

    def __init__(self, folder: Path, *, extra_names: tuple[str, ...] = (), cut_after: int | None = None) -> None:
        self.folder, self.extra_names, self.cut_after = folder, extra_names, cut_after
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: list[str | None] = []
        self.cuts = 0
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                stand_in.answer(self, body=False)

            def do_GET(self) -> None:
                stand_in.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        self.tokens.append(request.headers.get("Authorization"))
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        refused = {
            "nobody/nothing": (404, "RepoNotFound", "Repository not found"),
            "nobody/private": (401, "RepoNotFound", "Repository not found"),
            "nobody/badtoken": (401, "", "Invalid credentials in Authorization header"),
            "nobody/gated": (403, "GatedRepo", "Access to model nobody/gated is restricted"),
        }.get(repo)
        if refused:
            status, code, message = refused
            self._json(request, {"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message}, body)
        elif path.startswith("/api/models/") and "/tree/" in path:
            self._json(request, self._tree(), 200, {}, body)
        elif path.startswith("/api/models/") and "/revision/nosuch" in path:
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: nosuch"}
            self._json(request, {"error": "no"}, 404, headers, body)
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": entry["path"]} for entry in self._tree()]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            self._json(request, info, 200, {}, body)
        else:
            self._file(request, path.split(f"/resolve/{COMMIT}/")[-1], body)

    def _tree(self) -> list[dict]:
        entries = []
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            name = file.relative_to(self.folder).as_posix()
            entries.append({"type": "file", "oid": digest[:40], "size": len(data), "path": name})
        entries += [{"type": "file", "oid": "0" * 40, "size": 3, "path": name} for name in self.extra_names]
        return entries

    def _json(self, request, content: object, status: int, headers: dict[str, str], body: bool) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            if value:
                request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def _file(self, request, name: str, body: bool) -> None:
        if name not in self.extra_names and not (self.folder / name).is_file():
            self._json(request, {"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = b"bad" if name in self.extra_names else (self.folder / name).read_bytes()
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:40]}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if not body:
            return
        if self.cut_after is not None and self.cuts == 0 and len(data) > 15_000_000:
            self.cuts += 1
            request.wfile.write(data[start : start + self.cut_after])
            request.wfile.flush()
            request.connection.close()
            request.close_connection = True
            return
        request.wfile.write(data[start:])
