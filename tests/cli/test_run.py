"""``moe-beyond run``: text, figures, recordings, checks, chats, and one line for each mistake."""

import io
import json
import threading
from pathlib import Path

import pytest
import torch
from _helpers.common import error_line
from transformers import LlamaConfig, LlamaForCausalLM, TextStreamer

from moe_beyond.cache.policies import SUMMARIES, load_policy
from moe_beyond.cli.main import main
from moe_beyond.collect.devices import devices
from moe_beyond.collect.load import Checkpoint, load_model
from moe_beyond.files import sealed
from moe_beyond.pretrained import shipped_folder
from moe_beyond.runtime.options import FUTURE_POLICIES

PROMPT = "The list of all exceptions"
SHORT = ("--budget", "25%", "--max-new-tokens", "8")


def run(*words: str | Path) -> int:
    return main(["run", "--model", "small-moe", *map(str, words)])


def expected_text(prompt: str, tokens: int) -> str:
    """Text of the unmodified model."""
    model, tokenizer, _ = load_model("small-moe")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_the_text_equals_that_of_the_unmodified_model(capsys, tmp_path, tier):
    file = tmp_path / "run.json"
    assert run("--prompt", PROMPT, *SHORT, "--tier", tier, "--quiet", "--json", file) == 0
    out, err = capsys.readouterr()
    assert out == expected_text(PROMPT, 8) + "\n"
    assert err == ""
    content = json.loads(file.read_text())
    assert [result["policy"] for result in content["results"]] == ["lru", "lru", "belady"]
    measured, lru, belady = content["results"]
    assert (measured["measured"], measured["device"]) == (True, "this machine (cpu)")
    assert measured["per_layer"] == lru["per_layer"]
    assert belady["misses"] < lru["misses"]
    figures = content["run"]
    assert figures["transfers"] == measured["demand_transfers"]
    assert figures["decode"]["tokens"] == 7  # the last token is not read
    assert sum(figures["bytes"].values()) == figures["transfers"] * 49152
    assert (figures["bytes"]["host"] > 0) == (tier == "host")
    memory = figures["memory"]
    assert memory["slots_bytes"] == 48 * 49152
    assert memory["host_bytes"] == (192 * 49152 if tier == "host" else 0)
    parts = memory["resident_bytes"] + memory["slots_bytes"] + memory["host_bytes"]
    assert memory["place"] == "host"
    assert {"host": parts} == memory["total_bytes"]
    assert parts < memory["peak_bytes"]["host"]
    assert figures["generations"][0]["text"] == out.removesuffix("\n")


def test_figures_follow_the_text(capsys):
    assert run("--prompt", PROMPT, *SHORT) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "this run: lru",
        "belady",
        "measured on this machine (cpu)",
        "tokens/s over 7 tokens",
        "from the disk",
    ):
        assert words in out, words
    assert run("--prompt", PROMPT, "--budget", "19", "--max-new-tokens", "2", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"][0]["budget_slots"] == 19
    assert "19 slots hold less than the 24 experts of one token" in err
    assert expected_text(PROMPT, 2) in err


def test_prompts_of_a_file(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    for more, names in ((), ["prompts-1", "prompts-3", "prompts-4"]), (("--max-prompts", "1"), ["prompts-1"]):
        assert run("--prompts", tmp_path / "prompts.txt", *SHORT, *more, "--json", "-") == 0
        out, err = capsys.readouterr()
        assert [each["sequence_id"] for each in json.loads(out)["run"]["generations"]] == names
        assert ("1 blank line skipped" in err) == (not more)


def test_a_chat_keeps_the_conversation(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert run("--chat", *SHORT, "--json", "-") == 0
    first, second = json.loads(capsys.readouterr().out)["run"]["generations"]
    assert (first["sequence_id"], second["sequence_id"]) == ("turn-1", "turn-2")
    assert first["text"] == expected_text("one", 8)
    assert second["text"] == expected_text(f"one\n{first['text']}\ntwo", 8)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run("--chat", *SHORT) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_chat_goes_on_after_a_refused_message(capsys, monkeypatch, errors):
    lines = b"one\ncaf\xe9\n" + b"a " * 2000 + b"\ntwo\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8", errors=errors))
    assert run("--chat", *SHORT, "--quiet", "--json", "-") == 0
    out, err = capsys.readouterr()
    first, second = json.loads(out)["run"]["generations"]
    assert second["sequence_id"] == "turn-2"
    assert second["text"] == expected_text(f"one\n{first['text']}\ntwo", 8)
    refused = [line for line in err.splitlines() if line.startswith("moe-beyond: error: ")]
    assert len(refused) == 2
    assert refused[0].endswith("turn-2: is not text in UTF-8; write the message in UTF-8")
    assert "exceeds the 1,024 positions" in refused[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xe9"), encoding="utf-8", errors=errors))
    assert run("--chat", *SHORT) == 2


def test_a_recorded_run_is_replayed_and_repeated(capsys, tmp_path):
    folder, file = tmp_path / "trace", tmp_path / "run.json"
    assert run("--prompt", PROMPT, *SHORT, "--trace", folder, "--json", file) == 0
    capsys.readouterr()
    measured = json.loads(file.read_text())["results"][0]
    words = ["replay", "--traces", str(folder), "--budget", "48", "--carry-over", "--json", "-"]
    assert main([*words, "--prefill-chunk", str(measured["prefill_chunk"])]) == 0
    replayed = json.loads(capsys.readouterr().out)["results"][0]
    for name in ("accesses", "hits", "misses", "demand_transfers", "per_layer"):
        assert replayed[name] == measured[name], name
    steps = ("--carry-over", "--prefill-chunk", str(measured["prefill_chunk"]))
    for given, hint in ((), True), (steps[:1], True), (steps, False):
        assert main(["replay", "--traces", str(folder), *given]) == 0
        assert (f"--as-run repeats it, and {' '.join(steps)} gives" in capsys.readouterr().out) == hint
    assert main(["replay", "--traces", str(folder), "--as-run"]) == 0
    assert capsys.readouterr().out == "as run: 64 of 64 events equal\n"
    assert "--policy: --as-run repeats the choice of the run; leave one of them out" in error_line(
        capsys, ["replay", "--traces", folder, "--as-run", "--policy", "lfu"]
    )
    for words in (
        "--split all", "--budget 10%", "--strategy all", "--prefetch none", "--lookahead 1", "--scores x",
        "--device rtx4060-laptop", "--scope per-layer", "--quotas even", "--warm-start", "--carry-over", "--cold-host",
        "--prefill-chunk 4", "--batch-size 2", "--sequential", "--warmup-tokens 1", "--no-first-layer-prefetch",
        "--quantization 4", "--plots x", "--config x",
    ):  # fmt: skip
        option = words.split()[0]
        line = error_line(capsys, ["replay", "--traces", folder, "--as-run", *words.split()])
        assert line == f"{option}: --as-run repeats the choice of the run; leave one of them out"
    content = json.loads((folder / "run.json").read_text())
    content["options"]["policy"] = "lfu"
    (folder / "run.json").write_text(json.dumps(sealed(content)))
    assert main(["replay", "--traces", str(folder), "--as-run"]) == 1
    assert "of 64 events equal; step" in capsys.readouterr().out


def test_a_run_whose_folder_is_taken_meanwhile_keeps_its_figures(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "trace"
    put = TextStreamer.put

    def taking(self: TextStreamer, value: torch.Tensor) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").touch()
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", taking)
    assert run("--prompt", PROMPT, *SHORT, "--trace", folder) == 2
    out, err = capsys.readouterr()
    assert "this run: lru" in out
    assert err.startswith(f"moe-beyond: error: {folder}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_check_compares_with_the_unmodified_model(capsys, monkeypatch):
    words = ("--prompt", PROMPT, "--budget", "3", "--max-new-tokens", "6", "--temperature", "0.9", "--check")
    assert run(*words) == 0
    assert "identical: 6 of 6 tokens, logits bitwise" in capsys.readouterr().out
    load = Checkpoint.load

    def other(self: Checkpoint, **options: object) -> object:
        model = load(self, **options)
        model.lm_head.weight.data *= 1.01
        return model

    monkeypatch.setattr(Checkpoint, "load", other)
    assert run(*words, "--quiet", "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)["run"]["check"]["identical"] is False
    monkeypatch.setattr("moe_beyond.runtime.check.available_memory", lambda: 1000)
    assert "--check: loads the whole model" in error_line(capsys, ["run", "--model", "small-moe", *words])


def test_a_packed_model_has_no_unmodified_one(capsys, tmp_path):
    packed = tmp_path / "packed"
    assert main(["pack", "small-moe", str(packed), "--quiet"]) == 0
    words = ["run", "--model", packed, "--prompt", PROMPT, *SHORT]
    assert "is packed; leave --check out" in error_line(capsys, [*words, "--check"])
    assert main([*map(str, words), "--quiet"]) == 0
    assert capsys.readouterr().out == expected_text(PROMPT, 8) + "\n"


def test_an_interrupt_leaves_no_thread_and_no_file(capsys, monkeypatch, tmp_path):
    put, calls = TextStreamer.put, []

    def interrupted(self: TextStreamer, value: torch.Tensor) -> None:
        calls.append(value)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    assert run("--prompt", PROMPT, *SHORT, "--trace", tmp_path / "trace") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]
    assert not list(tmp_path.iterdir())


def test_help_lists_strategies_that_a_run_accepts(capsys):
    assert FUTURE_POLICIES == tuple(name for name in SUMMARIES if "future" in load_policy(name).NEEDS)
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert "hobbit" in text
    assert "moe_infinity" in text
    assert "oracle" not in text
    assert "belady" not in text.partition("--policy POLICY")[2]


def test_mistakes_are_one_line(capsys, tmp_path):
    def refused(*words: str | Path, model: str | Path = "small-moe") -> str:
        return error_line(capsys, ["run", "--model", model, *words])

    text = ("--prompt", PROMPT)
    assert refused() == "run: needs one source of text (got none); give one of --prompt, --prompts, --chat"
    assert "(got --prompt and --chat)" in refused(*text, "--chat")
    assert "unknown --tier 'ram'" in refused(*text, "--tier", "ram")
    assert "unknown --dtype 'int8'" in refused(*text, "--dtype", "int8")
    assert "unknown --policy 'lur'" in refused(*text, "--policy", "lur")
    assert "--max-new-tokens: must be at least 1 (got 0)" in refused(*text, "--max-new-tokens", "0")
    assert "--temperature: must be 0" in refused(*text, "--temperature", "-1")
    for value, says in (("1e3", "(got '1e3'); write 1000"), ("inf", "(got 'inf'); give a finite number")):
        assert refused(*text, "--max-new-tokens", value) == f"--max-new-tokens: expects a whole number {says}"
    assert refused(*text, "--temperature=inf") == "--temperature: expects a number (got 'inf'); give a finite number"
    assert "--temperature: must be 0" in refused(*text, "--temperature", ".inf")
    assert "--predict-log: needs a predictor" in refused(*text, "--predict-log", tmp_path / "log.json")
    assert "--readers: must be at least 1 (got 0)" in refused(*text, "--readers", "0")
    assert "--max-prompts: needs --prompts" in refused(*text, "--max-prompts", "1")
    assert "this machine has no such device" in refused(*text, "--device", "cuda:9")
    assert "an offloaded model has one device" in refused(*text, "--device", "auto")
    assert refused(*text, "--device", "cpu:3").endswith(f"choose one of: {', '.join(devices())}")
    assert "reads experts from the disk during the run" in refused(*text, "--tier", "host", "--direct-io")
    assert "prompt-1: is empty" in refused("--prompt", "  ")
    assert "exceeds the 1,024 positions" in refused(*text, "--max-new-tokens", "5000")
    assert "there is no such file" in refused("--prompts", "./nowhere.txt")
    assert "there is no such folder" in refused(*text, model="./nowhere")
    assert "needs the future" in refused(*text, "--policy", "belady")
    assert "needs scores" in refused(*text, "--prefetch", "top3")
    assert "budget" in refused(*text, "--budget", "2")
    assert "budget" in refused(*text, "--budget", "lots")
    other = refused(*text, "--predictor", "history.deepseek-v2-lite-puffin")
    assert "but the predictor was fitted for 26 MoE layers" in other
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "already exists" in refused(*text, "--trace", tmp_path / "taken")
    assert "is a folder; name a file" in refused(*text, "--json", tmp_path)
    assert refused(*text, "--trace", "/proc/x", model="./nowhere").startswith("/proc/x: cannot be made")
    dense = tmp_path / "dense"
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).write_bytes((shipped_folder("small-moe") / name).read_bytes())
    assert "LlamaForCausalLM: has no experts module" in refused(*text, model=dense)
    trace = tmp_path / "trace"
    refused(*text, "--trace", trace, "--budget", "2")
    assert not trace.exists()
