"""A bucket of Google Cloud Storage in memory, behind the HTTP that its clients speak.

Four clients take part in a run on `gs://`, and all are the real ones: TensorFlow's (epath and the event files go by
it), TensorStore's (the arrays of checkpoints), that of array_record (records of data sets) and google-cloud-storage
(Orbax asks what kind of bucket it is). The last three are told the address by environment variables. TensorFlow's has
its addresses built in: it is told of a proxy, which answers in their place, by a certificate that it is told to trust.
"""

import contextlib
import http.server
import json
import re
import ssl
import threading
import urllib.parse
from pathlib import Path

import trustme

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
_TIME = "2026-01-01T00:00:00.000Z"


class Bucket:
    """Objects by name, each with a generation that every write raises, and a log of the requests."""

    name = "bucket"  # there is no other

    def __init__(self):
        self.read_only = False
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[tuple[str, str]] = []  # client, method and what of
        self.lock = threading.Lock()
        self._generation = 0

    def put(self, name: str, content: bytes) -> None:
        self._generation += 1
        self.objects[name] = (bytes(content), self._generation)

    def get(self, name: str) -> bytes:
        return self.objects[name][0]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def upload(self, folder: Path, prefix: str) -> None:
        """Puts all files below a local folder there, as `gcloud storage cp -r` does."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def environment(port: int, cert: Path) -> dict[str, str]:
    """What leads all clients of this process, and of its children, to the server at `port`."""
    address = f"http://127.0.0.1:{port}"
    return {
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record's
        "STORAGE_EMULATOR_HOST": address,  # google-cloud-storage's
        "GOOGLE_CLOUD_PROJECT": "test",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "https_proxy": address,
        "no_proxy": "",
        "CURL_CA_BUNDLE": str(cert),
        "GCS_RETRY_CONFIG_MAX_RETRIES": "2",
        "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000",
    }


@contextlib.contextmanager
def serving(bucket: Bucket, folder: Path):
    """Serves the bucket, under any name, and gives the environment that its clients need."""
    authority, cert = trustme.CA(), folder / "cert.pem"
    authority.cert_pem.write_to_path(cert)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    handler = type("Handler", (_Handler,), {"bucket": bucket, "tls": tls, "sessions": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield environment(server.server_port, cert)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Requests of the JSON API, and reading by that of XML (`/BUCKET/OBJECT`)."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: Bucket
    tls: ssl.SSLContext
    sessions: dict[str, tuple[str, dict[str, str], bytearray]]  # uploads in parts

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # a client that went away
            super().handle()

    def finish(self):
        super().finish()
        self.connection.close()  # after a CONNECT it is not the one that the server closes

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self._body()
        client = self.headers.get("User-Agent", "")
        self.bucket.requests.append((client.split("/")[0], f"{self.command} {self.path}"))
        name = re.match(r"/(?:(?:upload/|download/)?storage/v1/b/)?([^/]+)", url.path)
        if name is None or name[1] not in (self.bucket.name, "resumable"):
            return self._error(404)
        if self.bucket.read_only and self.command != "GET":
            return self._error(403)
        with self.bucket.lock:
            self._dispatch(url.path, query, body)

    def _dispatch(self, path: str, query: dict[str, str], body: bytes):
        if re.fullmatch(r"/upload/storage/v1/b/[^/]+/o", path):
            return self._upload(query, body)
        if path == "/resumable":
            return self._part(query["id"], body)
        if match := re.fullmatch(r"/storage/v1/b/[^/]+/o/(.+)/rewriteTo/b/[^/]+/o/(.+)", path):
            source, target = map(urllib.parse.unquote, match.groups())
            if source not in self.bucket.objects:
                return self._error(404)
            self.bucket.put(target, self.bucket.get(source))
            facts = self._facts(target)
            progress = {"objectSize": facts["size"], "totalBytesRewritten": facts["size"]}
            return self._json({"done": True, **progress, "resource": facts})
        if match := re.fullmatch(r"/(?:download/)?storage/v1/b/[^/]+/o/(.+)", path):
            return self._object(urllib.parse.unquote(match[1]), query)
        if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
            return self._list(query)
        if re.fullmatch(r"/storage/v1/b/[^/]+/storageLayout", path):
            return self._json({"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": False}})
        if re.fullmatch(r"/storage/v1/b/[^/]+", path):
            return self._json({"kind": "storage#bucket", "name": self.bucket.name, "location": "US"})
        if match := re.fullmatch(r"/[^/]+/(.+)", path):  # the XML API
            return self._object(urllib.parse.unquote(match[1]), {"alt": "media"})
        return self._error(400)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _object(self, name: str, query: dict[str, str]):
        found = self.bucket.objects.get(name)
        if self.command == "DELETE":
            if found is None:
                return self._error(404)
            if self._refused(name, query):
                return self._error(412)
            del self.bucket.objects[name]
            return self._send(204, b"")
        if found is None:
            return self._error(412 if query.get("ifGenerationMatch", "0") != "0" else 404)
        if self._refused(name, query):
            return self._error(412)
        if query.get("ifGenerationNotMatch") == str(found[1]):
            return self._send(304, b"")
        return self._content(*found) if query.get("alt") == "media" else self._json(self._facts(name))

    def _content(self, content: bytes, generation: int):
        size, headers, status = len(content), {"x-goog-generation": generation}, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, size - int(match[2]))
            last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
            if first >= size:
                return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        headers["x-goog-stored-content-length"] = size
        self._send(status, content, headers)

    def _list(self, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.bucket.names(prefix):
            rest = name[len(prefix) :]
            if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                continue
            if delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                prefixes.add(folder)
                if name != folder or query.get("includeTrailingDelimiter") != "true":
                    continue
            items.append(self._facts(name))
        most = int(query.get("maxResults", 1000))
        begin = int(query.get("pageToken", 0))
        answer = {"kind": "storage#objects", "items": items[begin : begin + most], "prefixes": sorted(prefixes)}
        if begin + most < len(items):
            answer["nextPageToken"] = str(begin + most)
        self._json(answer)

    def _upload(self, query: dict[str, str], body: bytes):
        kind = query.get("uploadType", "media")
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            session = f"s{len(self.sessions)}"
            self.sessions[session] = (name, query, bytearray())
            host = self.headers["Host"]
            scheme = "https" if host.split(":")[0] in HOSTS else "http"
            return self._send(200, b"", {"Location": f"{scheme}://{host}/resumable?id={session}"})
        if kind != "media":
            return self._error(400)
        self._put(query["name"], query, body)

    def _part(self, session: str, body: bytes):
        name, query, content = self.sessions[session]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if span and span[1]:
            content[int(span[1]) :] = body
        elif not span:
            content[:] = body
        if span and (span[2] == "*" or len(content) < int(span[2])):
            return self._send(308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {})
        self._put(name, query, bytes(content))

    def _put(self, name: str, query: dict[str, str], content: bytes):
        if self._refused(name, query):
            return self._error(412)
        self.bucket.put(name, content)
        self._json(self._facts(name))

    def _refused(self, name: str, query: dict[str, str]) -> bool:
        generation = self.bucket.objects.get(name, (b"", 0))[1]
        return query.get("ifGenerationMatch", str(generation)) != str(generation)

    def _facts(self, name: str) -> dict[str, str]:
        content, generation = self.bucket.objects[name]
        facts = {"name": name, "bucket": self.bucket.name, "size": str(len(content)), "generation": str(generation)}
        return {**facts, "kind": "storage#object", "metageneration": "1", "updated": _TIME, "timeCreated": _TIME}

    def _error(self, status: int):
        self._json({"error": {"code": status, "message": self.responses[status][0]}}, status)

    def _json(self, content, status: int = 200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
