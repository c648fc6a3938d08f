"""The public endpoints of the Hub that an upload of a model needs, on the loopback interface."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN = "hf_secretsecret"
CUT = "cut"  # a fault: half of the body is read, then the connection is closed
HALF_ANSWER = "half"  # a fault: the request is done, and the connection closed without an answer


class FakeHub:
    """Repositories of the user ``me``, and what was asked.

    Attributes:
        repositories: {name: {branch: {path: content}}}.
        commits: (repository, branch, summary, paths) of each.
        private: {name: whether it was made private}, as the request said.
        requests: (method, path) of each request, in order.
        bodies: all that was sent.
        held: a pattern of paths whose requests are answered only once ``released`` is set.
        faults: (method, pattern of the path, fault): each request that fits the first of its kind takes it away. A
            fault is ``CUT``, ``HALF_ANSWER`` or (status, headers, body).
    """

    def __init__(self):
        self.repositories, self.objects, self.private = {}, {}, {}
        self.commits, self.requests, self.bodies, self.faults = [], [], [], []
        self.held, self.released = None, threading.Event()
        self.lock = threading.Lock()
        self.address = ""

    def files(self, name="me/model", branch="main"):
        return self.repositories[name][branch]

    def count(self, method, pattern):
        return sum(m == method and bool(re.search(pattern, path)) for m, path in self.requests)

    def fail(self, method, pattern, *faults):
        self.faults += [(method, pattern, fault) for fault in faults]

    def fault_of(self, method, path):
        for number, (kind, pattern, fault) in enumerate(self.faults):
            if kind == method and re.search(pattern, path):
                del self.faults[number]
                return fault
        return None

    def answer(self, method, path, token, body):
        """(status, value or bytes, error code)."""
        if path.startswith("/lfs/"):  # a presigned address
            content, oid = body, path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            self.objects[oid] = content
            return 200, {}, None
        if token != TOKEN:
            return 401, {"error": f"Invalid credentials: {token}"}, "RepoNotFound"
        for kind, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if kind == method and found:
                return act(self, *map(unquote, found.groups()), body)
        return 404, {"error": f"no such address: {method} {path}"}, None

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            return 403, {"error": f"You don't have the rights to create a model under {name}"}, None
        url = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            return 409, url | {"error": "You already created this model repo"}, None
        self.repositories[name] = defaultdict(dict, main={".gitattributes": b""})
        self.private[name] = asked.get("private") or asked.get("visibility") == "private"
        return 200, url, None

    def branch(self, name, branch, body):
        if branch in self.repositories[name]:
            return 409, {"error": "Reference already exists"}, None
        self.repositories[name][branch] = dict(self.repositories[name]["main"])
        return 200, {}, None

    def resolve(self, name, branch, path, body):
        files = self.repositories.get(name, {}).get(branch, {})
        return (200, files[path], None) if path in files else (404, {"error": "Entry not found"}, "EntryNotFound")

    def validate(self, body):
        content = json.loads(body)["content"]
        metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        base = metadata.get("base_model") or "some/base"
        errors = [] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else [{"message": '"base_model" must be an id'}]
        return 400 if errors else 200, {"warnings": [], "errors": errors}, None

    def preupload(self, name, branch, body):
        there, found = self.repositories[name][branch], []
        for file in json.loads(body)["files"]:
            known, large = there.get(file["path"]), file["path"].endswith((".safetensors", ".parquet"))
            oid = known and (hashlib.sha256(known) if large else hashlib.sha1(b"blob %d\0" % len(known) + known))
            mode = "lfs" if large else "regular"
            about = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            found.append(about | ({"oid": oid.hexdigest()} if oid else {}))
        return 200, {"files": found}, None

    def batch(self, name, body):
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.address}/lfs/{asked['oid']}"}}}
            objects.append(
                {"oid": asked["oid"], "size": asked["size"]} | ({} if asked["oid"] in self.objects else upload)
            )
        return 200, {"transfer": "basic", "objects": objects}, None

    def commit(self, name, branch, body):
        header, *operations = map(json.loads, body.splitlines())
        files, paths = self.repositories[name][branch], []
        for operation in operations:
            value = operation["value"]
            large = operation["key"] == "lfsFile"
            content = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
            files[value["path"]] = content
            paths.append(value["path"])
        self.commits.append((name, branch, header["value"]["summary"], paths))
        sha = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha}, None

    def about(self, name, branch, body):
        sha = f"{len(self.commits):040x}"
        return 200, {"id": name, "sha": sha, "siblings": [], "tags": [], "downloads": 0, "private": False}, None


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", FakeHub.create),
    ("POST", "/api/validate-yaml", FakeHub.validate),
    ("POST", f"/api/(?:models|datasets)/{NAME}/branch/([^/]+)", FakeHub.branch),
    ("GET", f"/(?:datasets/)?{NAME}/resolve/([^/]+)/(.+)", FakeHub.resolve),
    ("POST", f"/api/(?:models|datasets)/{NAME}/preupload/([^/]+)", FakeHub.preupload),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", FakeHub.batch),
    ("POST", f"/api/(?:models|datasets)/{NAME}/commit/([^/]+)", FakeHub.commit),
    ("GET", f"/api/(?:models|datasets)/{NAME}/revision/([^/]+)", FakeHub.about),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        with hub.lock:
            hub.requests.append((self.command, path))
            fault = hub.fault_of(self.command, path)
        if hub.held is not None and re.search(hub.held, path):
            hub.released.wait()
        if fault == CUT:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._close()
        body = self._body()
        if fault not in (None, HALF_ANSWER):
            status, headers, text = fault
            return self._send(status, text.encode(), headers)
        with hub.lock:
            hub.bodies.append(body)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, value, code = hub.answer(self.command, path, token, body)
        if fault == HALF_ANSWER:
            return self._close()
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self._send(status, content, {"X-Error-Code": code} if code else {})

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _close(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def log_message(self, *about):
        pass


@contextmanager
def serving():
    """A ``FakeHub`` that answers at its ``address``."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hub = True, hub
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
