"""The page about a run or a predictor: its content, its independence of other files, and its refusals."""

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from _helpers.common import TINY, VOCAB, error_line, tiny_traces
from _helpers.fitting import Run

from moe_beyond.cli.main import main
from moe_beyond.files import sealed
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.registry import create

VOID = {"meta", "link", "br", "img", "input", "hr"}
BUDGETS = ("--budget", "25%", "--budget", "50%", "--split", "validation", "--warmup-tokens", "2")


@dataclass
class Page(HTMLParser):
    """What a reader and a browser find in a page; refuses tags that do not close."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] in (["th"], ["td"]):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def report(subject: object, traces: object, out: Path, *words: str) -> Page:
    assert main(["report", str(subject), "--traces", str(traces), "--out", str(out), *words]) == 0
    return parsed(out)


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of the run and its figures."""
    folder = tmp_path_factory.mktemp("report")
    words = (*BUDGETS, "--device", "rtx3060", "--device", "phone-ufs4", "--json", str(folder / "found.json"))
    report(run.folder, run.traces, folder / "report.html", *words)
    return folder


def test_it_holds_what_evaluate_says(run: Run, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, found = parsed(made / "report.html"), json.loads((made / "found.json").read_text())
    words = ["--policy", "belief", "--policy", "lru", "--lookahead", "1", "--json", "-"]
    capsys.readouterr()
    assert main(["evaluate", str(run.folder / "predictor"), "--traces", str(run.traces), *BUDGETS, *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert found["metrics"] == said["metrics"]
    assert [row for row in found["results"] if "device" not in row] == said["results"]
    for row in said["metrics"]:
        figures = [str(row["lookahead"]), f"{row['recall_at_k']:.1%}", f"{row['f1_micro']:.1%}"]
        assert [r for r in page.rows if r[:3] == figures and r[-1] == f"{row['calibration_error']:.2%}"]
        for n, layer in enumerate(TINY.moe_layers):
            assert [r for r in page.rows if r[0] == str(layer) and f"{row['by_layer'][n]['recall_at_k']:.1%}" in r]
    for row in found["results"]:
        shown = [row["strategy"], f"{row['budget_slots']:,} ({row['budget_share']:.1%})"]
        figures = {f"{row['hit_rate']:.1%}", f"{row['bytes_ratio']:.2f}"}
        if "device" in row:
            speed = row["tokens_per_second"]  # of so small a model in the ten thousands
            figures |= {f"{speed:,.0f}" if speed >= 1000 else f"{speed:.1f}", f"{row['stall_ms_per_token']:.1f}"}
        assert [r for r in page.rows if r[:2] == shown and figures <= set(r)], row
    assert "On rtx3060 with 8 slots, prefetching " in page.text
    assert "Replays: each sequence starts with an empty cache; one token per step, prompts included; " in page.text
    short, counted = (said["results"][0][name] for name in ("too_short", "sequences"))
    assert f"{short} of {short + counted} sequences are too short to count" in page.text
    # The summary shows every hit rate with its bytes, LRU and Belady.
    ours, _, lru, belady, _ = (row for row in said["results"] if row["budget_slots"] == 8)
    assert f"LRU {lru['hit_rate']:.1%}, Belady {belady['hit_rate']:.1%}" in page.text
    assert f"LRU {lru['bytes_ratio']:.2f}, Belady {belady['bytes_ratio']:.2f}" in page.text
    assert f"{ours['hit_rate']:.1%}" in page.text


def test_it_says_what_was_fitted_on_what(run: Run, made: Path) -> None:
    text = parsed(made / "report.html").text
    config = json.loads((run.folder / "predictor/config.json").read_text())
    training = config["training"]
    said = [training["fingerprint"], f"{config['parameters']:,}", "1, 2, 3", "calibrated per lookahead and layer"]
    said += [
        f"{training['sequences']:,} sequences, {training['tokens']:,} tokens",
        "split train",
        config["tool_version"],
    ]
    said += ["The model read this text as a prompt", "The first 2 tokens"]
    said += ["split validation of this set chose the epoch of and calibrated cross_layer: expect a little less"]
    said += ["No pretrained history exists for this model", "class_path: moe_beyond.datamodules.TraceDataModule"]
    for words in said:
        assert words in text, words
    for title in (
        "Training loss",
        "Validation recall",
        "Validation NLL",
        "Validation hit rate",
    ):
        assert title in text
    assert "budget 50%" in text


def test_it_is_one_file_that_anyone_can_read(made: Path) -> None:
    source, page = (made / "report.html").read_text(), parsed(made / "report.html")
    assert len(source) < 2**20
    links = [
        a[name] for _, a in page.tags for name in ("href", "src", "srcset", "data", "action", "poster") if name in a
    ]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(links) <= {"data:,", *(f"#{one}" for one in ids)}
    assert "url(" not in source
    assert "@import" not in source
    assert not re.search(r"https?://", source)
    assert not page.all("script")
    assert [a.get("lang") for a in page.all("html")] == ["en"]
    assert len(page.all("h1")) == 1
    pictures = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(pictures) > 10
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))


def test_the_same_command_gives_the_same_bytes(run: Run, made: Path, tmp_path: Path) -> None:
    words = (*BUDGETS, "--device", "rtx3060", "--device", "phone-ufs4")
    report(run.folder, run.traces, tmp_path / "again.html", *words)
    assert (tmp_path / "again.html").read_bytes() == (made / "report.html").read_bytes()


def test_whatever_names_hold_is_text(run: Run, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    config = json.loads((folder / "predictor/config.json").read_text())
    config["training"] |= {"source": f'"><img src=x onerror=alert(2)>{bad}', "model_id": bad, "recipe": {bad: bad}}
    config["geometry"]["model"] = bad
    (folder / "predictor/config.json").write_text(json.dumps(sealed(config)))
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    kept |= {"more": {"tag": bad, "api_key": "hunter2", "token_budget": 17}}
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    curves = (folder / "metrics.csv").read_text().replace("val_lookahead_1/nll", "val_lookahead_</svg><script>/nll")
    (folder / "metrics.csv").write_text(curves)
    device = tmp_path / "device.json"
    device.write_text(json.dumps({"base": "rtx3060", "name": f"</svg>{bad}", "source": bad}))
    tiny_traces(tmp_path / "traces", geometry=replace(TINY, model=f"</title>{bad}"))
    words = ("--budget", "50%", "--device", str(device))
    page = report(folder, tmp_path / "traces", tmp_path / "report.html", *words)
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count(bad) > 6
    assert "lookahead_" not in page.text  # a strange column is a line's name and nothing else
    assert "hunter2" not in (tmp_path / "report.html").read_text()
    assert "token_budget: 17" in page.text


def test_a_predictor_folder_has_curves_if_it_lies_in_a_run(run: Run, tmp_path: Path) -> None:
    words = ("--budget", "50%", "--device", "rtx3060")
    apart = shutil.copytree(run.folder / "predictor", tmp_path / "predictor")
    assert "a predictor folder outside a run" in report(apart, run.traces, tmp_path / "a.html", *words).text
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val_lookahead_1/nll\n0,19,2.5,\n0,20,,9.25\n1,39,1.5,\n")
    inside = report(folder / "predictor", run.traces, tmp_path / "b.html", *words).text
    assert "outside a run" not in inside
    assert all(said in inside for said in ("loss, step 19: 2.5", "loss, step 39: 1.5", "1, step 20: 9.25"))
    # A long fit's losses are drawn as means: of 401 batches, three at a time.
    losses = "".join(f"0,{step},{step}\n" for step in range(1, 402))
    (folder / "metrics.csv").write_text(f"epoch,step,train/loss\n{losses}")
    text = report(folder, run.traces, tmp_path / "b.html", *words).text
    assert "means of 3" in text
    assert "loss, step 3: 2" in text
    assert "loss, step 401: 400.5" in text
    assert "measured on split validation: split train is training text of cross_layer" in inside  # none was named


def test_scores_that_no_runtime_could_have_are_marked(run: Run, tmp_path: Path) -> None:
    predictor = create("row_encoder", TINY, VOCAB, bidirectional=True, width=16, depth=1, heads=2)
    save_predictor(predictor, tmp_path / "p", {})
    page = report(tmp_path / "p", run.traces, tmp_path / "report.html", "--budget", "50%", "--device", "rtx3060")
    assert "LEAK: this predictor sees later tokens" in page.text
    assert [row for row in page.rows if row[0] == "token (LEAK: sees later tokens)"]
    assert [row for row in page.rows if row[0] == "lru + top2" and row[-1] == "token (LEAK)"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "1"], "below one event's demand of 2 experts"),
        (["--budget", "lots"], "budget 'lots' cannot be read"),
        (["--split", "tset"], "unknown split"),
        (["--warmup-tokens", "-1"], "--warmup-tokens -1 is less than 0"),
        (["--warmup-tokens", "99"], "--warmup-tokens 99: no sequence has more tokens"),
        (["--device", "rtx9999x"], "unknown device 'rtx9999x'"),
        (["--device", "rtx3060", "--device", "rtx4090,name=rtx3060"], "two devices have the same name (got 'rtx3060')"),
    ],
)
def test_options_that_cannot_be(run: Run, tmp_path: Path, capsys, words: list[str], said: str) -> None:
    out = tmp_path / "report.html"
    assert said in error_line(capsys, ["report", run.folder, "--traces", run.traces, "--out", out, *words])
    assert list(tmp_path.iterdir()) == []


def test_subjects_and_places_that_cannot_be(run: Run, tmp_path: Path, capsys) -> None:
    out, traces = ["--out", tmp_path / "out.html"], ["--traces", run.traces]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: neither a run" in error_line(capsys, ["report", empty, *traces, *out])
    assert "there is no such folder" in error_line(capsys, ["report", tmp_path / "nowhere", *traces, *out])
    assert "cross_laser" in error_line(capsys, ["report", "cross_laser", *traces, *out])
    assert f"--out {empty}: is a folder; name a file" in error_line(
        capsys, ["report", run.folder, *traces, "--out", empty]
    )
    other = tmp_path / "other"
    tiny_traces(other, geometry=replace(TINY, num_experts=16))
    said = error_line(capsys, ["report", run.folder, "--traces", other, *out])
    assert f"{other}: has 4 MoE layers x 16 experts" in said
    broken = Path(shutil.copytree(run.folder, tmp_path / "broken"))
    (broken / "metrics.csv").write_text("epoch,step,train/loss\n0,1,0.5\n0,2,lots\n")
    words = [*traces, *out, "--budget", "50%", "--device", "rtx3060"]
    assert f"{broken}/metrics.csv: line 3: train/loss is not a number (got 'lots')" in error_line(
        capsys, ["report", broken, *words]
    )
    for content, said in ((b"epoch,loss\n", "has no column 'step'"), (b"step\n\xff", "is not a CSV file")):
        (broken / "metrics.csv").write_bytes(content)
        assert f"{broken}/metrics.csv: {said}" in error_line(capsys, ["report", broken, *words])
    (broken / "config.yaml").write_text("a: [")
    assert f"{broken}/config.yaml, line 2: is not YAML" in error_line(capsys, ["report", broken, *words])
    shutil.rmtree(broken / "predictor")
    assert f"{broken}: the run has no predictor/" in error_line(capsys, ["report", broken, *words])
    assert not (tmp_path / "out.html").exists()


def test_help_states_the_defaults_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_beyond.report.html.strategies import DEFAULT_DEVICES, DEFAULT_SHARES

    assert main(["report", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {', '.join(DEFAULT_DEVICES)})" in text
    *shares, last = DEFAULT_SHARES
    assert f"(default: {', '.join(map(str, shares))} and {last}% of all experts)" in text
