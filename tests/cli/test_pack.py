"""``moe-beyond pack``: the copy, its JSON, and one line for each mistake."""

import json
from pathlib import Path

import pytest
from _helpers.common import error_line
from transformers import LlamaConfig, LlamaForCausalLM

from moe_beyond.cli.main import main
from moe_beyond.pretrained import shipped_folder


def test_a_model_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    assert main(["pack", "small-moe", str(out), "--dtype", "bfloat16", "--json", str(tmp_path / "r.json")]) == 0
    line = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result == {
        "folder": str(out),
        "dtype": "bfloat16",
        "experts": result["experts"],
        "expert_bytes": (out / "experts.safetensors").stat().st_size,
        "other_bytes": result["other_bytes"],
    }
    assert line.startswith(f"{out}: {result['experts']} experts in bfloat16, ")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    names = {path.name for path in shipped_folder("small-moe").iterdir()}
    assert {path.name for path in out.iterdir()} >= {name for name in names if name.startswith("tokenizer")}
    assert main(["pack", "small-moe", str(tmp_path / "b"), "--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == result["experts"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str | Path) -> str:
        return error_line(capsys, ["pack", *arguments])

    out = tmp_path / "out"
    assert "unknown --dtype 'int8'" in refused("small-moe", out, "--dtype", "int8")
    assert "there is no such folder" in refused("./nowhere", out)
    dense = tmp_path / "dense"
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).write_bytes((shipped_folder("small-moe") / name).read_bytes())
    assert "LlamaForCausalLM: has no experts module; give a mixture-of-experts model" in refused(dense, out)
    assert not out.exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "already exists; choose another folder or remove it" in refused("small-moe", tmp_path / "taken")
    below = tmp_path / "taken" / "file" / "y"
    assert f"{below}: cannot be made, choose another folder; {below.parent}: Not a directory" in refused(
        "small-moe", below
    )
