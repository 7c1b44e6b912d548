"""A Hub on the loopback interface: the endpoints that creating a repository and uploading a folder use.

Weights go the way of git LFS, as on the Hub: announced, put to a URL that the server names, and then committed by hash.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_may_write"
#: What the Hub wants by LFS: parts of names.
LARGE = (".safetensors", ".bin", "tfevents")


class Handler(BaseHTTPRequestHandler):
    hub: "Hub"

    def log_message(self, *_):
        pass

    def do_PUT(self):
        body = self._body()
        if self.hub.drop_uploads:
            self.hub.drop_uploads -= 1
            self._drop()
            return
        oid = hashlib.sha256(body).hexdigest()
        if self.path != f"/lfs/{oid}":
            self._answer(400, {"error": f"{self.path} is not the hash of what came"})
            return
        self.hub.large_objects[oid] = body
        self._answer(200, {})

    def do_POST(self):
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if any(part in f["path"] for part in LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.hub.may_transfer.wait(timeout=600)
            objects = [
                {**obj, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{obj['oid']}"}}}
                for obj in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(self.path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self._answer(404, {"error": f"not implemented: {self.path}"})

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").split("/revision")[0].split("?")[0]
        if name in self.hub.repositories:
            self._answer(200, {"id": name, "siblings": [], "private": self.hub.private[name]})
        else:
            self._answer(404, {"error": "Repository not found"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'somebody'}/{request['name']}"
        if request["name"] in self.hub.taken:
            self._answer(403, {"error": "You don't have the rights to create a model under this name"})
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, {})
        self.hub.private.setdefault(name, request.get("visibility") == "private" or bool(request.get("private")))
        self._answer(status, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _commit(self, name: str, body: bytes) -> None:
        if self.hub.drop_commits:
            self.hub.drop_commits -= 1
            self._drop()
            return
        if self.hub.busy:
            self.hub.busy -= 1
            self._answer(503, {"error": "Service unavailable"})
            return
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.large_objects[value["oid"]]
        self.hub.versions[self.hub.commits[-1]] = dict(self.hub.repositories[name])
        oid = f"{len(self.hub.commits):040x}"
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Hub:
    """`repositories[id]` has the files of a repository, `commits` what was committed, in order, and `versions[message]`
    the files after a commit.

    Clear `may_transfer` to let uploads of large files wait, after the client has hashed them, until it is set. Set
    `drop_commits` and `drop_uploads` to let the connection break in so many of the next commits and uploads of large
    files, `busy` to let so many commits be put off, and `taken` to names that belong to somebody else.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.versions: dict[str, dict[str, bytes]] = {}
        self.large_objects: dict[str, bytes] = {}
        self.may_transfer = threading.Event()
        self.may_transfer.set()
        self.drop_commits = 0
        self.drop_uploads = 0
        self.busy = 0
        self.taken: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
