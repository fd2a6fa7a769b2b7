"""A model hub on this machine: a real HTTP server with the endpoints that huggingface_hub calls to publish a model.

It knows one token, and one owner, `me`. What was committed is in `files`, by repository and revision.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

from tests.library.launch import free_port

TOKEN = "hf_" + "secret" * 5


@dataclass
class FakeHub:
    """What the server has received.

    Attributes:
        files: content by (repository, revision) and path.
        commits: messages, in order.
        delay_s: how long a commit takes.
        is_silent: whether requests get no answer at all.
    """

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    branches: list[tuple[str, str]] = field(default_factory=list)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    delay_s: float = 0.0
    is_silent: bool = False

    def environment(self) -> dict[str, str]:
        """Variables with which a process takes this server for the hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        words = path.strip("/").split("/")
        match words:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
                if not name.startswith("me/"):
                    return 403, {"error": f"no right to create {name}"}
                if name in self.private:
                    return 409, {"error": "there already", "url": f"{self.url}/{name}"}
                self.private[name] = wanted.get("visibility") == "private"
                return 200, {"url": f"{self.url}/{name}", "name": name}
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "models", owner, name, "branch", branch]:
                self.branches.append((f"{owner}/{name}", branch))
                return 200, {}
            case ["api", "models", _, _, "preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                return 200, {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]}
            case [_, _, "info", "lfs", "objects", "batch"]:
                wanted = json.loads(body)["objects"]
                return 200, {
                    "transfer": "basic",
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}"}}} for one in wanted
                    ],
                }
            case ["upload", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.objects[digest] = body
                return 200, {}
            case ["api", "models", owner, name, "commit", revision]:
                time.sleep(self.delay_s)
                return 200, self._commit(f"{owner}/{name}", revision, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no endpoint {path}"}

    def _commit(self, name: str, revision: str, lines: list[dict]) -> dict:
        files = self.files.setdefault((name, revision), {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            while hub.is_silent:
                time.sleep(0.1)
            path = self.path.split("?")[0]
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or "upload" in path.split("/")
            status, answer = hub.answer(path, body) if is_known else (401, {"error": "who are you"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET = _serve

        def log_message(self, *_) -> None:
            pass

    return Handler


@contextmanager
def taken_for_the_hub(url: str | None) -> Iterator[None]:
    """Within, huggingface_hub of this process takes `url` for the hub; None: a port at which nobody is."""
    constants = huggingface_hub.constants
    wanted = {"ENDPOINT": url or f"http://127.0.0.1:{free_port()}", "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    before = {name: getattr(constants, name) for name in wanted}
    for name, value in wanted.items():
        setattr(constants, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.is_silent = False
        server.shutdown()
        server.server_close()
        thread.join()
