"""A Hub on the loopback interface: the endpoints that creating a repository and uploading a folder use."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_may_write"


class Handler(BaseHTTPRequestHandler):
    hub: "Hub"

    def log_message(self, *_):
        pass

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer(200, {"files": files})
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
            self.close_connection = True
            self.connection.close()
            return
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
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
    """`repositories[id]` has the files of a repository, `commits` what was committed, in order.

    Set `drop_commits` to let the connection break in so many of the next commits, and `taken` to names that belong to
    somebody else.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.drop_commits = 0
        self.taken: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
