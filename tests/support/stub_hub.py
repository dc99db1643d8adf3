"""A Hugging Face Hub on the loopback, for the real client library: repositories of files, to read and to commit to.

The library reads the address of the Hub from the environment when it is imported, so that this module must be imported
before it. Its cache is in a temporary folder.
"""

import base64
import hashlib
import http.server
import json
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
        writers: owners whose repositories may be written to.
        commits: summary of each commit, and the paths that it changed.
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
        self.writers: set[str] = {"user"}
        self.commits: list[tuple[str, set[str]]] = []
        self.stored: dict[str, bytes] = {}  # contents of large files by SHA-256, until a commit names them
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

    def do_PUT(self):
        content = self._body()
        hub.stored[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_POST(self):
        """What the library asks to commit: https://huggingface.co/docs/hub/api, and the batch API of Git LFS."""
        path = urllib.parse.unquote(self.path)
        hub.requests.append(("POST", path))
        hub.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        body = self._body()
        address = f"http://127.0.0.1:{_server.server_port}"
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization', 'user')}/{asked['name']}"
            if repo.split("/")[0] not in hub.writers:
                return self._error(403, "Forbidden")
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            return self._json({"url": f"{address}/{repo}"}, status)
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = {
                oid: {"href": f"{address}/put/{oid}"} for oid in (one["oid"] for one in json.loads(body)["objects"])
            }
            sizes = {one["oid"]: one["size"] for one in json.loads(body)["objects"]}
            objects = [{"oid": oid, "size": sizes[oid], "actions": {"upload": upload[oid]}} for oid in upload]
            return self._json({"transfer": "basic", "objects": objects})
        _, _, owner, name, action, revision = path.strip("/").split("/", 5)  # api/models/OWNER/NAME/ACTION/REVISION
        repo = f"{owner}/{name}"
        if repo not in hub.files:
            return self._error(404, "RepoNotFound")
        if revision != "main":
            return self._error(404, "RevisionNotFound")
        if action == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if ".safetensors" in one["path"] else "regular"}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        changed, summary = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            else:
                changed[value["path"]] = hub.stored[value["oid"]]
        hub.files[repo] |= changed
        hub.commits.append((summary, set(changed)))
        return self._json({"success": True, "commitUrl": f"{address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

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
