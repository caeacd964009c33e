"""A password in the URL of a trace set: it opens the set, and is neither stored nor shown."""

import base64
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER

from moe_beyond.cli.main import main
from moe_beyond.traces.reader import TraceSet
from moe_beyond.urls import without_secrets

USER, PASSWORD = "Someone", "Swordfish"
SECRETS = (USER.encode(), PASSWORD.encode(), base64.b64encode(f"{USER}:{PASSWORD}".encode()))


class Guarded(SimpleHTTPRequestHandler):
    """Serves files to whoever knows the password."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] == f"Basic {SECRETS[2].decode()}":
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a server with a trace set."""
    folder = tmp_path_factory.mktemp("served")
    tiny_traces(folder / "set", sequences=24)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_the_password_of_a_trace_set_is_in_no_file_and_no_line(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb-{name}"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_TOKEN", PASSWORD)  # no variable of the environment is stored either
    traces = f"http://{USER}:{PASSWORD}@{address}/set"
    configs = [word for name in ("trainer/default", "model/cross_layer", "data/traces") for word in ("-c", name)]
    words = ["fit", *configs, f"--data.traces={traces}", "--trainer.max_epochs=1", *TINY_CROSS_LAYER, "--json=f.json"]
    monkeypatch.setattr(sys, "argv", ["moe-beyond", *words])  # wandb stores the arguments of the process
    assert main(words) == 0
    run = next(tmp_path.glob("runs/*/version_0"))
    assert f"traces: http://{address}/set\n" in (run / "config.yaml").read_text()
    assert main(["evaluate", str(run), "--traces", traces, "--json", "e.json"]) == 0
    evaluated = ["evaluate", str(run / "predictor"), "--traces", traces, "--record-training-text"]
    assert main(evaluated) == 0
    assert main(["report", str(run), "--traces", traces, "--out", "page.html"]) == 0
    assert main(["inspect", traces, "--contrast", traces, "--json", "i.json"]) == 0
    assert main(["tune", "--traces", traces, "--budget", "25%", "--out", "strategy.yaml"]) in (0, 2)
    for wrong in (f"{traces}/nowhere", traces.replace(PASSWORD, f"{PASSWORD}2"), f"{traces}?token={PASSWORD}"):
        assert main(["inspect", wrong]) == 2
    assert main(["evaluate", str(run)]) == 2  # the run does not know the password
    said = "".join(capfd.readouterr()).encode()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    for secret in SECRETS:
        assert secret not in said
        assert not [str(path) for path in written if secret in path.read_bytes()]


def test_the_folder_of_a_set_is_shown_without_its_password(address: str, capsys) -> None:
    traces = TraceSet(f"http://{USER}:{PASSWORD}@{address}/set")
    assert traces.folder == f"http://{address}/set"
    assert len(list(traces)) == 24
    line = error_line(capsys, ["inspect", f"http://{USER}:{PASSWORD}@{address}/set", "--split", "x"])
    assert line.startswith(f"unknown split of http://{address}/set 'x'")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@host:80/set/a.parquet: x", "https://host:80/set/a.parquet: x"),
        ("https://token@host", "https://host"),
        ("https://us@er:pa'ss@host/set", "https://host/set"),
        ("https://user:pa/ss@host/set", "https://host/set"),
        ("https://user:pa?s#s@host/set", "https://host/set"),
        ("simplecache::ftp://u:p@host/a", "simplecache::ftp://host/a"),
        ("https://host/set?X-Amz-Signature=abc&b=c", "https://host/set"),
        ("'https://host/set#token'", "'https://host/set'"),
        ("hf://datasets/org/set@v1/a", "hf://datasets/org/set@v1/a"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("abfs://container@account/a", "abfs://container@account/a"),
        ("https://a:b@c and https://d:e@f", "https://c and https://f"),
        ("name@host: no URL", "name@host: no URL"),
    ],
)
def test_secrets_are_cut_out_of_urls(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_configs_of_this_repository_have_no_url_that_would_change() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        assert without_secrets(path.read_text()) == path.read_text()
