"""An S3 server on this machine, behind a proxy that breaks requests on demand."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

KEY, SECRET = "AKIAOFTHETESTS", "secretOfTheTests"
BUCKET = "sets"


@dataclass
class ObjectStore:
    """A bucket; ``faults`` break the next downloads of a file, and ``bodies`` counts those that were sent whole.

    A fault is ``"refuse"`` (status 503), ``"drop"`` (no answer) or ``"cut"`` (half of the body, then no more).
    """

    endpoint: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    bodies: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, name: str) -> str | None:
        with self.lock:
            waiting = self.faults.get(name)
            return waiting.pop(0) if waiting else None


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Serve the files of a folder as ``s3://sets/FOLDER``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"{folder.name}/{path.name}")
    store = ObjectStore()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].rpartition("/")[2]
            fault = store.fault(name) if self.command == "GET" else None
            if fault == "drop":
                self.close_connection = True
                return
            if fault == "refuse":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            inner = HTTPConnection("127.0.0.1", port)
            inner.request(self.command, self.path, headers=dict(self.headers))
            answer = inner.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for header, value in answer.getheaders():
                if header.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(header, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            if fault == "cut":
                self.close_connection = True
            elif answer.status in (200, 206):
                with store.lock:
                    store.bodies[name] += 1

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield store
    finally:
        proxy.shutdown()
        server.stop()
