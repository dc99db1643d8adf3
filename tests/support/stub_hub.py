"""A Hugging Face Hub on the loopback, for the real client library: repositories of files, read by revision.

The library reads the address of the Hub from the environment when it is imported, so that this module must be imported
before it. Its cache is in a temporary folder.
"""

import hashlib
import http.server
import os
import tempfile
import threading
import urllib.parse

COMMIT = "a" * 40


class Hub:
    """Repositories by name, each with its files; and what else the Hub may answer.

    Attributes:
        files: repository -> path -> content.
        gated: repositories whose terms must be accepted.
        small: repositories whose files are kept by git, which names them by SHA-1.
        broken: whether contents are cut off on their way, the last byte changed.
        requests: method and path of each request.
        token: that of the last request.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.small: set[str] = set()
        self.broken = False
        self.requests: list[tuple[str, str]] = []
        self.token: str | None = None


hub = Hub()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        path = urllib.parse.unquote(self.path)
        hub.requests.append((self.command, path))
        hub.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        owner, name, _, revision, *file = path.strip("/").split("/")
        repo, file = f"{owner}/{name}", "/".join(file)
        if repo in hub.gated:
            return self._error(403, "GatedRepo")
        if repo not in hub.files:
            return self._error(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        if file not in hub.files[repo]:
            return self._error(404, "EntryNotFound")
        content = hub.files[repo][file]
        if repo in hub.small:
            etag = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        else:
            etag = hashlib.sha256(content).hexdigest()
        if hub.broken:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
threading.Thread(target=_server.serve_forever, daemon=True).start()
_home = tempfile.TemporaryDirectory(prefix="hub-")
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{_server.server_port}",
    "HF_HOME": _home.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}
