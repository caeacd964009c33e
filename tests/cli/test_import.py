"""``moe-beyond import``: a trace set out of a recording, or one line that names what is wrong with it."""

import json
import os

import pytest
from _helpers.common import error_line, failure, prompt_csv, word_tokenizer

from moe_beyond.cli.main import main
from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.geometry import Geometry
from moe_beyond.traces.reader import TraceSet

SMALL = Geometry("small", (1, 2), num_experts=4, top_k=2, params_per_expert=1000, other_params_per_layer=0)
WORDS = ["<unk>", "Ġthe", ",", "\n", "NA", ""]
# Two tokens through two layers. Row numbers in messages count the header as row 1.
GOOD = [(1, "NA", "[3, 0]"), (1, "Ġthe", "[1, 2]"), (2, "NA", "[0, 1]"), (2, "Ġthe", "[2, 3]")]


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """The current folder holds a recording of two prompts, its tokenizer and its geometry."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        prompt_csv(tmp_path / "puffin" / f"prompt_{number}_data.csv", GOOD)
    word_tokenizer(tmp_path / "words.json", WORDS)
    (tmp_path / "small.json").write_text(json.dumps(SMALL.to_json()))
    return tmp_path


def command(*more, source="puffin", out="out", model="small.json", tokenizer="words.json"):
    """The arguments of an import, with defaults."""
    known = ["import", "moe-beyond-csv", source, "--out", out, "--model", model]
    return [*known, *(["--tokenizer", tokenizer] if tokenizer else []), *more]


def test_a_recording_becomes_a_trace_set(recording, capsys):
    assert main(command()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("out: 8 entries in = 8 entries out, ")
    assert "  train: 2 sequences, 4 tokens\n" in out
    traces = TraceSet("out")
    assert traces.geometry == SMALL
    for trace in traces.traces():
        assert trace.token_ids.tolist() == [4, 1]
        assert trace.experts.tolist() == [[[3, 0], [0, 1]], [[1, 2], [2, 3]]]
    assert sorted(os.listdir("out")) == ["README.md", "manifest.json", "tokenizer.json", "train-00000.parquet"]


def test_validation_blocks_are_told(recording, capsys):
    prompt_csv(recording / "puffin" / "prompt_3_data.csv", GOOD[::2])
    # Prompts 1 and 2 are copies, of which validation takes none while training holds the other.
    assert "every sequence chosen for the split is a copy" in failure(capsys, recording, command("--val-blocks", "1:3"))
    other = [(layer, {"NA": "Ġthe", "Ġthe": "NA"}[token], experts) for layer, token, experts in GOOD]
    prompt_csv(recording / "puffin" / "prompt_2_data.csv", other)
    assert main(command("--val-blocks", "1:3")) == 0
    out = capsys.readouterr().out
    # The blocks have 2, 2 and 1 tokens. A third of 5 is nearest to 2, and prompt 1 is the first block of 2.
    assert "  train: 2 sequences, 3 tokens\n" in out
    assert "  validation: 1 sequences, 2 tokens\n" in out
    assert [trace.sequence_id for trace in TraceSet("out").traces("validation")] == ["puffin-1"]


def test_block_sizes_are_not_read_as_a_time_of_day(recording, capsys):
    # YAML 1.1, which jsonargparse parses values with, takes 20:10 for 1210 seconds.
    assert "only 1 blocks" in failure(capsys, recording, command("--val-blocks", "20:10"))


def test_a_hugging_face_config_serves_as_the_model(recording):
    config = {
        "model_type": "dots1",
        "hidden_size": 8,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
    }
    (recording / "config.json").write_text(json.dumps(config))
    assert main(command(model="config.json")) == 0
    geometry = TraceSet("out").geometry
    assert (geometry.moe_layers, geometry.params_per_expert) == ((1, 2), 3 * 8 * 16)


def test_a_preset_brings_its_tokenizer(recording, capsys):
    rows = [(layer, "Ġthe", "[0, 1, 2, 3, 4, 63]") for layer in range(1, 27)]
    prompt_csv(recording / "deep" / "prompt_1_data.csv", rows)
    assert main(command(source="deep", model="deepseek-v2-lite", tokenizer=None)) == 0
    traces = TraceSet("out")
    (trace,) = traces.traces()
    assert trace.experts.tolist() == [[[0, 1, 2, 3, 4, 63]] * 26]
    assert traces.token_strings[trace.token_ids[0]] == "Ġthe"
    assert traces.manifest.tokenizer.name == "deepseek-v2"


def changed(row, column, value):
    """The good rows with one cell changed; ``row`` as messages count them."""
    rows = [list(cells) for cells in GOOD]
    rows[row - 2][column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (GOOD[:3], ["layer 2 has 1 tokens", "layer 1 has 2", "again"]),
        (GOOD[:2], ["has layers 1..1 (1)", "small's MoE layers are 1..2 (2)"]),
        ([(layer - 1, *rest) for layer, *rest in GOOD], ["has layers 0..1 (2)", "1..2 (2)"]),
        ([*GOOD, (3, "NA", "[0, 1]"), (3, "Ġthe", "[0, 1]")], ["has layers 1..3 (3)", "1..2 (2)"]),
        (changed(4, 2, "[0, 4]"), ["row 4", "expert id 4 is out of range 0..3"]),
        (changed(3, 2, "[-1, 2]"), ["row 3", "expert id -1 is out of range 0..3"]),
        (changed(5, 2, "[2, 2]"), ["row 5", "an expert occurs twice in one entry"]),
        (changed(5, 2, "[2]"), ["row 5", "must have the 2 experts of small (got 1)"]),
        (changed(2, 2, "[0, 1, 2]"), ["row 2", "must have the 2 experts of small (got 3)"]),
        (changed(2, 2, "[]"), ["row 2", "must have the 2 experts of small (got 0)"]),
        (changed(2, 2, ""), ["row 2"]),
        (changed(3, 2, "[0, x]"), ["row 3", "must be a whole number", "x"]),
        (changed(3, 2, "[0, 1.5]"), ["row 3", "must be a whole number", "1.5"]),
        (changed(3, 2, "[0, ]"), ["row 3"]),
        (changed(5, 1, "Ġunheard"), ["row 5", "has no token 'Ġunheard'", "words.json"]),
        (changed(5, 1, " Ġthe"), ["row 5", "has no token ' Ġthe'"]),
        (changed(4, 1, ","), ["token 0 differs between layers 2 and 1"]),
        (changed(3, 0, ""), ["row 3", "Layer ID is empty"]),
        (changed(3, 0, "one"), ["'one'"]),
        ([], ["has no rows"]),
    ],
    ids=lambda value: value[-1] if value and isinstance(value[-1], str) else "",
)
def test_a_bad_row_is_named_and_nothing_is_left(rows, says, recording, capsys):
    # The bad prompt is the second, so that the first has been read already.
    prompt_csv(recording / "puffin" / "prompt_2_data.csv", rows)
    line = failure(capsys, recording, command())
    assert line.startswith("puffin/prompt_2_data.csv: ")
    for words in says:
        assert words in line


@pytest.mark.parametrize("missing", ["Layer ID", "Token", "Activated Expert IDs"])
def test_a_missing_column_is_named(missing, recording, capsys):
    header = [name if name != missing else "Else" for name in ("Layer ID", "Token", "Activated Expert IDs")]
    prompt_csv(recording / "puffin" / "prompt_2_data.csv", GOOD, header)
    line = failure(capsys, recording, command())
    assert line.startswith(f"puffin/prompt_2_data.csv: column {missing!r} is missing (got ")
    assert "Else" in line


@pytest.mark.parametrize(
    "content",
    [b"", b"Layer ID,Token,Activated Expert IDs\n1,a\n", b"\xff\xfe\x00"],
    ids=["empty", "ragged", "binary"],
)
def test_a_file_that_is_no_such_csv_is_named(content, recording, capsys):
    (recording / "puffin" / "prompt_2_data.csv").write_bytes(content)
    assert failure(capsys, recording, command()).startswith("puffin/prompt_2_data.csv: ")


def test_a_column_that_is_there_twice_is_named(recording, capsys):
    header = ["Layer ID", "Token", "Activated Expert IDs", "Token"]
    prompt_csv(recording / "puffin" / "prompt_2_data.csv", [(*row, "NA") for row in GOOD], header)
    line = failure(capsys, recording, command())
    assert line.startswith("puffin/prompt_2_data.csv: ")
    assert "Token" in line


def test_a_prompt_number_may_come_once(recording, capsys):
    prompt_csv(recording / "puffin" / "prompt_02_data.csv", GOOD)
    line = failure(capsys, recording, command())
    assert "prompt 2 is in" in line
    assert "prompt_02_data.csv" in line
    assert "prompt_2_data.csv" in line


def test_a_file_name_without_a_number_is_named(recording, capsys):
    (recording / "puffin" / "other.csv").write_text("x\n")
    assert failure(capsys, recording, command()).startswith("puffin/other.csv: the file name must start with prompt_")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["import", "nonsense", "puffin", "--out", "out", "--model", "small.json"], "unknown format 'nonsense'"),
        (command(source="nowhere"), "nowhere: is not a folder"),
        (command(source="words.json"), "words.json: is not a folder"),
        (command(source="empty"), "empty: has no prompt_N_*.csv file"),
        (
            command(model="deepseek-v2-light"),
            "unknown model preset 'deepseek-v2-light'; did you mean 'deepseek-v2-",
        ),
        (command(model="none.json"), "none.json: cannot be read"),
        (command(model="words.json"), "words.json: has no routed experts"),
        (command(tokenizer=None), "--tokenizer"),
        (command(tokenizer="none.json"), "tokenizer 'none.json'"),
        (command(tokenizer="./none"), "tokenizer './none'"),
        (command(tokenizer="puffin/prompt_1_data.csv"), "puffin/prompt_1_data.csv: is not a tokenizer.json"),
        (command("--val-blocks", "10"), "--val-blocks '10'"),
        (command("--val-blocks", "2:1"), "--val-blocks '2:1'"),
        (command("--val-blocks", "1:3"), "--val-blocks 1:3: only 2 blocks"),
        (command(out="taken"), "taken already exists"),
        (command(out="words.json"), "words.json already exists"),
        (command(out="words.json/out"), "words.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_option_is_named_and_nothing_is_left(words, says, recording, capsys):
    (recording / "empty").mkdir()
    (recording / "taken").mkdir()
    (recording / "taken" / "precious").write_text("1")
    assert says in failure(capsys, recording, words)


@pytest.mark.parametrize("option", ["--out", "--model"])
def test_what_is_required_is_named(option, recording, capsys):
    words = command()
    place = words.index(option)
    assert main(words[:place] + words[place + 2 :]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moe-beyond: error: import needs {option} ")
    assert err.count("\n") == 1


def test_an_unknown_verb_is_one_line(capsys):
    assert error_line(capsys, ["imporr"]) == "unknown command 'imporr'; did you mean 'import'?"


PREDICTED = [
    (1, 0, "[3, 0]", "[0, 1]"),
    (1, 1, "[1, 2]", "[2, 1]"),
    (2, 0, "[0, 1]", "[2, 3]"),
    (2, 1, "[2, 3]", "[3, 2]"),
]
COLUMNS = ("Layer ID", "Token", "Activated Expert IDs", "Predicted Expert IDs")


def predictions(folder, rows=PREDICTED):
    for number in (1, 2):
        prompt_csv(folder / "predicted" / f"prompt_{number}_data_predicted.csv", rows, header=COLUMNS)


def test_released_predictions_become_scores_that_say_what_they_know(recording, capsys):
    predictions(recording)
    assert main(command("--predictions", "predicted", "--scores", "scores")) == 0
    scores = ScoresFolder("scores")
    assert (scores.lookaheads, scores.causal) == ((0,), False)
    for number in (1, 2):
        found = scores.scores(f"puffin-{number}", 2)
        assert found[:, 0].tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 1, 0], [0, 0, 1, 1]]]
    capsys.readouterr()
    words = ["replay", "--traces", "out", "--scores", "scores", "--budget", "8"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "0 (LEAK" in said
    assert "reads the router's input and sees later tokens" in said
    assert main([*words, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)["results"][0]
    assert (told["lookahead"], told["causal"], told["predictor"]) == (0, False, "MoE-Beyond as released")
    # Room for all: of each prompt's 8 accesses, those predicted then or seen before hit (worked out by hand: layer 1
    # misses 3 of [3, 0] and neither of [1, 2]; layer 2 misses both of [0, 1] and neither of [2, 3]).
    assert (told["accesses"], told["hits"], told["demand_transfers"]) == (16, 10, 6)


def test_predictions_that_do_not_belong_are_refused(recording, capsys):
    predictions(recording, [(1, 0, "[3, 1]", "[0, 1]"), *PREDICTED[1:]])
    words = command("--predictions", "predicted", "--scores", "scores")
    assert "its activated experts are not those of prompt 1" in failure(capsys, recording, words)
    (recording / "predicted" / "prompt_1_data_predicted.csv").unlink()
    assert "has no predictions for prompt 1" in failure(capsys, recording, words)
    assert "belong together" in failure(capsys, recording, command("--scores", "scores"))
