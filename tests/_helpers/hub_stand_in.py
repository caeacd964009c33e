"""A small Hugging Face Hub on this machine, with the endpoints that this package uses: real HTTP and commits, no Xet.

`Hub.broken` makes a request fail: a method and a part of its path, and the status it is answered with (None: the
connection is dropped), once or always.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretOfTheTests"
REASONS = {429: "slow down", 403: "no right to write", 500: "out of order"}


@dataclass
class Repository:
    """Files by name, at every commit, and where branches stand; ``forbidden`` to write to for `TOKEN`."""

    private: bool = False
    forbidden: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        told = json.dumps([len(self.commits), sorted((name, len(content)) for name, content in files.items())])
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Hub:
    """The state: repositories by kind (``models``, ``datasets``) and name, and large files by hash."""

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.broken: dict[tuple[str, str], tuple[int | None, bool]] = {}
        self.asked: list[str] = []

    def model(self, name: str) -> Repository:
        return self.repositories["models", name]

    def breaks(self, method: str, path: str, status: int | None, *, once: bool = False) -> None:
        self.broken[method, path] = status, once


class Answers(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sizes = {"Content-Length": str(len(body))} if "Content-Length" not in headers else {}
        for name, value in {"Content-Type": "application/json", **sizes, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(status, {"error": message or REASONS.get(status, code)}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        for (method, part), (status, once) in list(hub.broken.items()):
            if method == self.command and fnmatchcase(path, f"*{part}*"):
                if once:
                    del hub.broken[method, part]
                if status is None:
                    self.close_connection = True
                    return self.connection.close()
                return self.refuse(status)
        if path.startswith("/lfs/"):
            hub.large[path.removeprefix("/lfs/")] = self.body
            return self.answer(200)
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(self.body), token)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        else:
            kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
            name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        found = hub.repositories.get((kind, name))
        if found is None or (found.private and token is None):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        return self.ask(found, kind, name, rest, token)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self, asked: dict[str, Any], token: str | None) -> None:
        name, kind = f"{asked['organization']}/{asked['name']}", f"{asked.get('type', 'model')}s"
        if token is None:
            return self.refuse(401, message="Invalid username or password.")
        if asked["organization"] == "others":
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        self.hub.repositories[kind, name] = Repository(private=asked.get("visibility") == "private")
        return self.answer(200, {"url": url, "name": name})

    def ask(self, found: Repository, kind: str, name: str, rest: list[str], token: str | None) -> None:
        what, writes = rest[0] if rest else "", self.command == "POST" and rest[:1] != ["paths-info"]
        if what == "auth-check":
            writes = rest[1:] == ["write"]
        if writes and (token is None or found.forbidden):
            return self.refuse(403, message="no right to write")
        if what == "auth-check":
            return self.answer(200, {})
        if what == "branch":
            if rest[1] in found.branches:
                return self.refuse(409, message="Reference already exists")
            found.branches[rest[1]] = found.branches["main"]
            return self.answer(200, {})
        if what == "info":  # git-lfs
            return self.answer(200, {"objects": [self.large(one) for one in json.loads(self.body)["objects"]]})
        revision = rest[1] if len(rest) > 1 else "main"
        oid = found.at(revision)
        if oid is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = found.commits[oid]
        if what == "preupload":
            return self.answer(200, {"files": [self.preuploaded(one, files) for one in json.loads(self.body)["files"]]})
        if what == "commit":
            new = found.commit(revision, self.committed(files))
            prefix = "datasets/" if kind == "datasets" else ""
            return self.answer(
                200, {"commitOid": new, "commitUrl": f"{self.hub.url}/{prefix}{name}/commit/{new}", "success": True}
            )
        if what == "resolve":
            return self.resolve(files.get("/".join(rest[2:])), oid)
        if what == "tree":
            return self.answer(200, [self.entry(one, files[one]) for one in sorted(files)])
        if what == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            return self.answer(200, [self.entry(one, files[one]) for one in wanted if one in files])
        siblings = [{"rfilename": one} for one in sorted(files)]
        told = {"id": name, "sha": oid, "private": found.private, "siblings": siblings, "tags": [], "downloads": 0}
        return self.answer(200, told)

    def large(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.large:
            return one
        return one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def preuploaded(self, one: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        large = one["path"].endswith((".safetensors", ".parquet", ".png"))
        told = {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if one["path"] in files:
            told["oid"] = self.oid(one["path"], files[one["path"]])
        return told

    def committed(self, files: dict[str, bytes]) -> dict[str, bytes]:
        new = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.hub.large[value["oid"]]  # a commit of a file that was not uploaded fails
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        return new

    def resolve(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    @staticmethod
    def oid(name: str, content: bytes) -> str:
        """How the Hub names a large file, or a small one as git does."""
        if name.endswith((".safetensors", ".parquet", ".png")):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": self.oid(name, content)}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a Hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubAnswers", (Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # looks that often whether to end
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
