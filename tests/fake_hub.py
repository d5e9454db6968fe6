"""A model hub on this machine for tests: the few endpoints that an upload uses, and what was sent to them."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class FakeHub:
    """created: bodies of requests for a repository. files: by path, of the last commit. tokens: of every request.

    refuse: whether every request is answered with 401, as for a token that is not valid.
    """

    def __init__(self, address: str, refuse: bool):
        self.address, self.refuse = address, refuse
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.uploaded: dict[str, bytes] = {}  # large files, by their SHA-256

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """Status and JSON."""
        if self.refuse:
            return 401, {"error": "no"}
        found = self.found(method, path, body)
        return (404, {"error": "no such page"}) if found is None else (200, found)

    def found(self, method: str, path: str, body: bytes) -> dict | None:
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = self.created[-1]["name"]
            return {"url": f"{self.address}/{self.created[-1].get('organization', 'me')}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": mode_of(path), "shouldIgnore": False} for path in files]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self.upload_action(wanted) for wanted in objects]}
        if method == "PUT" and path.startswith("/upload/"):
            self.uploaded[path.removeprefix("/upload/")] = body
            return {}
        if path.endswith("/commit/main"):
            return self.commit([json.loads(line) for line in body.splitlines()])
        return None

    def upload_action(self, wanted: dict) -> dict:
        return wanted | {"actions": {"upload": {"href": f"{self.address}/upload/{wanted['oid']}"}}}

    def commit(self, lines: list[dict]) -> dict:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.uploaded[value["oid"]]
        return {"commitUrl": f"{self.address}/me/name/commit/1", "commitOid": "1", "success": True}


def mode_of(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"


@contextmanager
def fake_hub(refuse: bool = False):
    """Serves on a free port of this machine until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization"))
            status, answer = hub.answer(self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}", refuse)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
