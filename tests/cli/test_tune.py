"""``moe-beyond tune``, and its strategy file in ``replay`` and ``run``."""

import json
from pathlib import Path

import pytest
import yaml
from _helpers.common import error_line, failure, tiny_traces
from _helpers.scoring import history_folder

from moe_beyond.cli.main import main
from moe_beyond.traces.reader import TraceSet

pytestmark = pytest.mark.usefixtures("few_policies")
SMALL = ("run", "--model", "small-moe", "--max-new-tokens", "6")


@pytest.fixture
def _house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history_folder(tmp_path / "history", tiny_traces(tmp_path / "traces", sequences=16))


def command(*words: object) -> int:
    return main([str(word) for word in words])


def printed_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    assert command(*words, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("_house")
def test_a_choice_is_replayed_from_its_file(capsys):
    words = ("tune", "--traces", "traces", "--budget", "30%", "--predictor", "history", "--profile", "history")
    report = printed_json(capsys, *words, "--for", "bytes", "--split", "all", "--out", "tuned.yaml")
    choice = yaml.safe_load(Path("tuned.yaml").read_text())
    assert choice == report["choice"]
    assert choice["budget"] == "30%"
    assert Path("tuned.yaml").read_text().startswith("# written by moe-beyond tune\n# choice: ")
    replayed = printed_json(capsys, "replay", "--traces", "traces", "--config", "tuned.yaml", "--split", "all")
    first = replayed["results"][0]
    for name in ("policy", "prefetch", "scope", "predictor", "lookahead", "budget_slots"):
        assert first[name] == report["results"][0][name], name
    assert sum(result["accesses"] for result in report["results"][:1]) < first["accesses"]  # one half of the set
    words = ("replay", "--traces", "traces", "--config", "tuned.yaml", "--budget", "50%", "--budget", "60%")
    replayed = printed_json(capsys, *words, "--split", "all")
    assert {result["budget_slots"] for result in replayed["results"]} == {16, 19}
    assert command(*words) == 0
    assert choice["policy"] in capsys.readouterr().out


@pytest.mark.usefixtures("_house")
def test_tables_and_sentences(capsys):
    assert command("tune", "--traces", "traces", "--budget", "30%", "--device", "rtx4060-laptop") == 0
    out = capsys.readouterr().out
    for words in (
        "tuned on", "strategies on the tuning half, the best first", "held-out half, with 95 % intervals", "belady",
        "choice: ", "no prefetcher was tried",
    ):  # fmt: skip
        assert words in out, words


@pytest.mark.usefixtures("_house")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file; name a strategy file, as moe-beyond tune --out writes it"),
        ("policy: lru", "strategy file: fields are missing or unknown (missing: budget)"),
        ("budget: 10%\npolcy: lru", "strategy file: fields are missing or unknown (unknown: 'polcy')"),
        ("- lru", "strategy file must be an object (got a list of 1)"),
        ("budget: 10%\npolicy: [lru]", "policy: has the wrong type (got a list of 1); write it as the option takes it"),
        ("budget: 0.1", "budget: has the wrong type (got 0.1); write it as the option takes it"),
    ],
)
def test_a_wrong_strategy_file_is_one_line(capsys, tmp_path, content, message):
    if content is not None:
        Path("c.yaml").write_text(content)
    for words in (("replay", "--traces", "traces"), (*SMALL, "--prompt", "one")):
        assert failure(capsys, tmp_path, [*words, "--config", "c.yaml"]) == f"--config c.yaml: {message}"
    Path("c.yaml").write_text("[" * 100_000)
    assert "c.yaml: nests values more than 50 deep" in error_line(
        capsys, ["replay", "--traces", "traces", "--config", "c.yaml"]
    )


@pytest.mark.usefixtures("_house")
def test_wrong_options_are_one_line(capsys, tmp_path):
    start = ("tune", "--traces", "traces")
    for words, message in (
        (("--for", "speed"), "unknown value of --for 'speed'"),
        (("--for", "tokens"), "--for tokens: a speed needs the timing model; add --device"),
        (("--device", "rtx9"), "unknown device 'rtx9'"),
        (("--budget", "10%", "--budget", "20%"), "--budget: tune is for one budget (got 2); give it once"),
        (("--out", "traces"), "--out traces: is a folder; name a file"),
        (("--predictor", "histroy"), "histroy"),
        (("--warmup-tokens", "19"), "tuning needs at least 4 conversations"),
    ):
        assert message in failure(capsys, tmp_path, [*start, *words])
    for words, message in (
        (("--auto",), "--auto: needs the device of the timing model; add --device-model DEVICE"),
        (("--device-model", "m4-max"), "--device-model: is the device of --auto; give --auto, or leave it out"),
        (("--auto", "--device-model", "m4-max", "--policy", "lfu"), "--policy: --auto chooses it"),
        (("--auto", "--device-model", "m4-max"), "--auto: records the first 8 prompts, so it needs --prompts with"),
    ):
        assert message in failure(capsys, tmp_path, [*SMALL, "--prompt", "one", *words])


def test_a_run_and_a_replay_with_a_strategy_file_have_equal_hits(capsys, tmp_path):
    file, prompts = tmp_path / "c.yaml", tmp_path / "prompts.txt"
    prompts.write_text("import os\nThe list of all exceptions\ndef main\n")
    file.write_text("budget: 25%\npolicy: lfu\nscope: per-layer\n")
    words = (*SMALL, "--prompts", prompts, "--config", file)
    measured = printed_json(capsys, *words, "--trace", tmp_path / "rec")["results"][0]
    assert (measured["policy"], measured["scope"], measured["budget_slots"]) == ("lfu", "per-layer", 48)
    steps = ("--carry-over", "--prefill-chunk", measured["prefill_chunk"])
    replayed = printed_json(capsys, "replay", "--traces", tmp_path / "rec", "--config", file, *steps)["results"][0]
    for name in ("policy", "scope", "hits", "misses", "per_layer"):
        assert measured[name] == replayed[name], name
    other = printed_json(capsys, *words, "--policy", "lru", "--budget=50%")["results"][0]
    assert (other["policy"], other["budget_slots"]) == ("lru", 96)


def test_a_run_chooses_its_strategy(capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"import module_{number}" for number in range(10)))
    words = (*SMALL, "--prompts", prompts, "--device-model", "rtx4060-laptop,link_gb_per_s=0.1")
    content = printed_json(capsys, *words, "--auto", "--trace", tmp_path / "rest")
    assert len(content["run"]["generations"]) == 2
    assert content["run"]["auto"][0] == "auto: recorded 8 prompts with lru; the table has the other prompts"
    assert len(TraceSet(str(tmp_path / "rest"))) == 2
    plain = printed_json(capsys, *SMALL, "--prompts", prompts, "--trace", tmp_path / "all")
    assert plain["run"]["generations"][8:] == content["run"]["generations"]  # the choice changes no token
    chosen = printed_json(capsys, *words[:5], "--prompt", "one", *words[7:], "--auto", tmp_path / "all")
    assert "judged on 5 sequences" in chosen["run"]["auto"][0]
    assert chosen["run"]["auto"][1].startswith(f"auto: choice: {chosen['results'][0]['policy']}")
