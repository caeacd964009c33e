"""Where a model comes from: one folder, one commit of the Hub, never code of its own, and never a wait for a path."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _helpers.common import error_line, failure
from _helpers.hub_stand_in import Hub, Repository
from _helpers.moe_architectures import tiny_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from moe_beyond.cli.main import main
from moe_beyond.collect import devices
from moe_beyond.collect.devices import placement
from moe_beyond.collect.forward import _half
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.reader import TraceSet

SMALL = shipped_folder("small-moe")
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def command(folder: Path, *more: object) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("def main():\nimport os\n")
    words = ["collect", "--prompts", folder / "prompts.txt", "--out", folder / "traces", "--quiet", *more]
    return [str(word) for word in words]


def versions() -> dict[str, dict[str, bytes]]:
    """A model at two revisions, all of whose files differ: ids of tokens, the end of a text, the template, weights."""
    main_files = {name: (SMALL / name).read_bytes() for name in FILES}
    tokenizer = json.loads(main_files["tokenizer.json"])
    ids = tokenizer["model"]["vocab"]
    ids["def"], ids["x"] = ids["x"], ids["def"]
    config = json.loads(main_files["config.json"]) | {"routed_scaling_factor": 2.0}
    files = main_files | {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": 77}',
        "chat_template.jinja": b"{{ messages[0].content }}",
        "pytorch_model.bin": b"a pickle",
        "modeling_small.py": b"raise SystemExit('code of the model was run')",
    }
    return {"main": main_files, "v1": files}


def test_a_revision_reaches_every_file(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["models", "org/tiny"] = Repository()
    for revision, files in versions().items():
        repository.commit(revision, files)
    files = versions()["v1"]
    assert main(command(tmp_path, "--model", "org/tiny", "--revision", "v1")) == 0
    manifest = TraceSet(str(tmp_path / "traces")).manifest
    assert (manifest.model_id, manifest.revision) == ("org/tiny", "v1")
    assert (tmp_path / "traces" / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert manifest.tokenizer.sha256 == hashlib.sha256(files["tokenizer.json"]).hexdigest()
    commits = [path for path in hub.asked if "/resolve/" in path]
    assert commits
    assert all(f"/resolve/{repository.branches['v1']}/" in path for path in commits)
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    checkpoint = open_checkpoint("org/tiny", "v1")
    model = checkpoint.load()
    assert (model.config.routed_scaling_factor, model.generation_config.eos_token_id) == (2.0, 77)
    assert checkpoint.tokenizer.chat_template == "{{ messages[0].content }}"
    assert open_checkpoint("hf:org/tiny@v1").revision == "v1"


def test_the_experts_of_a_packed_model_come_first(hub: Hub, tmp_path: Path) -> None:
    """An interrupted download has no weights without experts, so that the next one completes it."""
    repository = hub.repositories["models", "org/tiny"] = Repository()
    repository.commit("main", versions()["main"] | {"experts.safetensors": b"slabs"})
    checkpoint = open_checkpoint("org/tiny")
    assert not (checkpoint.folder / "experts.safetensors").exists()
    hub.breaks("HEAD", "model.safetensors", None)
    with pytest.raises(UserError):
        checkpoint.fetch_weights()
    assert (checkpoint.folder / "experts.safetensors").read_bytes() == b"slabs"
    assert not (checkpoint.folder / "model.safetensors").exists()


def cache(folder: Path, **revisions: dict[str, bytes]) -> None:
    """Lay a Hub cache out by hand."""
    root = folder / "models--org--tiny"
    for revision, files in revisions.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        for name, content in files.items():
            path = root / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("names", [("main", "v1"), ("v1",)])
def test_a_cache_serves_a_revision_offline(tmp_path: Path, monkeypatch, capsys, names: tuple[str, ...]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache(tmp_path / "hub", **{name: versions()[name] for name in names})
    assert main(command(tmp_path, "--model", "org/tiny", "--revision", "v1")) == 0
    stored = (tmp_path / "traces" / "tokenizer.json").read_bytes()
    assert stored == versions()["v1"]["tokenizer.json"]
    capsys.readouterr()
    line = error_line(capsys, command(tmp_path / "o", "--model", "org/tiny", "--revision", "v2"))
    assert line.startswith("model org/tiny at revision v2: is not in the local cache, and HF_HUB_OFFLINE")


@pytest.mark.parametrize("revision", ["main", hashlib.sha1(b"main").hexdigest()])
def test_without_a_network_the_cache_serves_at_once(tmp_path, capfd, monkeypatch, revision) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("waits for the Hub"))
    cache(tmp_path / "hub", main=versions()["main"])
    checkpoint = open_checkpoint("org/tiny", revision)
    checkpoint.fetch_weights()
    assert (checkpoint.folder / "model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match=r"the Hub is unreachable at http://127\.0\.0\.1:9"):
        open_checkpoint("org/tiny", "0" * 40)


def test_without_a_network_it_is_one_line_after_one_request(hub: Hub, tmp_path, capsys, monkeypatch) -> None:
    hub.breaks("GET", "/api/models/", None)
    hub.breaks("HEAD", "/resolve/", None)
    line = error_line(capsys, command(tmp_path, "--model", "org/tiny"))
    assert line.startswith("model org/tiny: the Hub is unreachable at http://127.0.0.1")
    assert len([path for path in hub.asked if "org/tiny" in path]) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("models/smal-moe", "models/smal-moe: there is no such folder; did you mean models/small-moe?"),
        ("./small-moe", "./small-moe: there is no such folder; a model on the Hub is ORG/REPO"),
        ("modles/small-moe/", "modles/small-moe/: there is no such folder; did you mean models/small-moe?"),
        ("a/b/c", "a/b/c: there is no such folder; a model on the Hub is ORG/REPO"),
        ("~/no-such-model", "~/no-such-model: there is no such folder; a model on the Hub is ORG/REPO"),
        ("model.safetensors", "model.safetensors: is a file; give its folder"),
        ("weights.gguf", "weights.gguf: there is no such folder; a model on the Hub is ORG/REPO"),
        ("models", "models: has no config.json; give the folder of a transformers model"),
        ("small moe", "unknown model 'small moe'; did you mean 'small-moe'?; give a folder, or a name on the Hub"),
        ("gpt2", "unknown model 'gpt2'; known: small-moe; give a folder, or a name on the Hub: ORG/REPO"),
    ],
)
def test_what_is_a_path_never_waits_for_the_hub(hub: Hub, tmp_path, monkeypatch, capsys, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small-moe").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    line = error_line(capsys, command(tmp_path, "--model", name))
    assert line.removeprefix("model").lstrip().startswith(says)
    assert not hub.asked


def test_a_folder_that_the_hub_may_have_meant_is_named(hub: Hub, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small-moe").mkdir(parents=True)
    line = error_line(capsys, command(tmp_path, "--model", "model/small-moe"))
    assert line.startswith("model model/small-moe: there is no such repository of this kind")
    assert line.endswith("; or did you mean the folder models/small-moe?")


def test_a_bundled_model_goes_by_its_name(tmp_path, capsys) -> None:
    assert open_checkpoint("small-moe").folder == SMALL
    line = failure(capsys, tmp_path.parent, command(tmp_path, "--model", "small-moe", "--revision", "v1"))
    assert line == "revision v1: model small-moe is a folder, which has no revisions; leave it out"


def with_code(folder: Path, **config: object) -> Path:
    """A model's folder with code of its own, which leaves a file behind if it is run."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'RUN')!r}, 'w')\n")
    return folder


def test_code_of_a_model_is_never_run(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    says = "needs Python code of the checkpoint (auto_map), which is never run; give a model whose"
    folder = with_code(tmp_path / "unknown", model_type="own", auto_map=own)
    assert f"model {folder}: {says}" in error_line(capsys, command(tmp_path, "--model", folder))
    # A configuration that transformers knows, of a model that it does not write text with.
    known = with_code(tmp_path / "known", model_type="clip", auto_map=own)
    assert f"model {known}: {says}" in error_line(capsys, command(tmp_path, "--model", known))
    tokenizer = with_code(tmp_path / "tokenizer", **LlamaConfig().to_dict())
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}})
    )
    line = error_line(capsys, command(tmp_path, "--model", tokenizer))
    assert f"model {tokenizer}: " in line
    assert not list(tmp_path.rglob("RUN"))


def test_a_model_that_transformers_has_is_loaded_without_its_code(tmp_path: Path, capsys) -> None:
    model = tiny_model("Qwen3MoeForCausalLM", vocab_size=2048)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    folder = with_code(tmp_path / "own", **config, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    shutil.copyfile(tmp_path / "saved" / "model.safetensors", folder / "model.safetensors")
    words = [word for word in command(tmp_path, "--model", folder) if word != "--quiet"]
    assert main(words) == 0
    assert (
        f"{folder}: its code (auto_map) is not run; the model class of transformers is used" in capsys.readouterr().out
    )
    assert not (folder / "RUN").exists()


def test_devices_are_named_and_a_gpu_is_the_default(monkeypatch) -> None:
    monkeypatch.setattr(devices, "_accelerator", lambda: "")
    assert (devices.devices(), placement(None), placement("cpu")) == (["cpu"], "cpu", "cpu")
    for name in ("gpu", "cuda", "cuda:0", "mps", "cpu:3", ""):
        with pytest.raises(UserError) as error:
            placement(name)
        assert str(error.value) == (
            f"device {name}: this machine has no such device (this PyTorch sees no GPU); choose one of: cpu, auto"
        )
    monkeypatch.setattr(devices, "_accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices.devices() == ["cuda:0", "cuda:1", "cpu"]
    assert [placement(name) for name in (None, "cuda", "cuda:1", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")  # torchrun's: ranks share the devices
    assert placement(None) == "cuda:1"
    with pytest.raises(UserError, match="device cuda:2: this machine has no such device; choose one of: cuda:0, "):
        placement("cuda:2")


def test_a_device_map_wants_accelerate_and_places_that_are_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "map.json"
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    path.write_text('{"": "cpu"}')
    for name in ("auto", str(path)):
        with pytest.raises(UserError, match="needs accelerate, which is not installed; run: pip install"):
            placement(name)
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    assert placement("auto") == "auto"
    assert placement(str(path)) == {"": "cpu"}
    for content, says in (
        ('{"model": "gpu"}', r"no such device for model \(got \'gpu\'\); choose one of"),
        ("[]", "is not a device map"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            placement(str(path))


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> Path:
    """Write small-moe with other weights."""
    shutil.copytree(SMALL, folder)
    weights = load_file(SMALL / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_weight_that_is_missing_or_of_another_shape_is_refused(tmp_path: Path, capfd) -> None:
    expert_weight = "model.layers.1.mlp.experts.3.gate_proj.weight"
    gates = [name for name in load_file(SMALL / "model.safetensors") if name.endswith("mlp.gate.weight")]
    expert = "model.layers.1.mlp.experts.down_proj"
    for number, (change, says) in enumerate(
        (
            (lambda weights: weights.pop(gates[0]), f"its files lack {gates[0]}, which would be random"),
            (
                lambda weights: [weights.pop(name) for name in gates],
                f"{', '.join(gates[:3])} and {len(gates) - 3} more",
            ),
            (lambda weights: weights.update({gates[0]: weights[gates[0]][:3].clone()}), f"({gates[0]} is [3, "),
            (lambda weights: [weights.pop(name) for name in list(weights) if "layers.1.mlp.experts" in name], expert),
            (lambda weights: weights.pop(expert_weight), "its files lack a weight, or one has the wrong shape"),
        )
    ):
        folder = changed_weights(tmp_path / f"model-{number}", change)
        line = failure(capfd, tmp_path / "out", command(tmp_path / "out", "--model", folder))
        assert line.startswith(f"model {folder}: its ")
        assert says in line


def test_a_tied_head_and_unread_weights_are_no_fault(tmp_path: Path, capfd) -> None:
    head = load_file(SMALL / "model.safetensors").get("lm_head.weight")
    folder = changed_weights(
        tmp_path / "tied",
        lambda weights: (weights.pop("lm_head.weight", None), weights.update({"extra.weight": torch.ones(3)})),
        tie_word_embeddings=True,
    )
    capfd.readouterr()
    assert main(command(tmp_path, "--model", folder)) == 0
    assert capfd.readouterr() == ("", "")
    if head is not None:  # not tied, it is missing
        untied = changed_weights(tmp_path / "untied", lambda weights: weights.pop("lm_head.weight"))
        assert "lack lm_head.weight" in error_line(capfd, command(tmp_path / "u", "--model", untied))


@pytest.mark.parametrize(
    ("more", "layer"),
    [((), 2), (("--record", "experts"), 2), (("--generate", 3, "--temperature", 1), 2), (("--batch-size", 1), 2)],
)
def test_gate_weights_that_are_not_finite_are_refused_at_the_first_batch(tmp_path, capfd, more, layer: int) -> None:
    gate = f"model.layers.{layer}.mlp.gate.weight"
    folder = changed_weights(tmp_path / "model", lambda weights: weights[gate].fill_(float("nan")))
    words = command(tmp_path / "out", "--model", folder, *more)
    assert failure(capfd, tmp_path / "out", words) == (
        f"prompts-1: the router of layer {layer} computes gate weights that are not finite (NaN or infinite), so its "
        "choice is meaningless; compute in another type (--dtype float32 or bfloat16), or give intact weights"
    )


def test_gate_weights_are_checked_by_layer_and_by_what_is_stored() -> None:
    geometry = Geometry("g", (1, 4), num_experts=4, top_k=2, params_per_expert=1, other_params_per_layer=1)
    weights = np.full((3, 2, 2), 0.1, np.float32)
    assert (_half(weights, "p", geometry, stored=True) == np.float16(0.1)).all()
    weights[2, 0, 1] = 70_000
    with pytest.raises(UserError, match=r"^p: a gate weight exceeds 65,504, .* \(got 70000\); .*\(--record experts\)$"):
        _half(weights, "p", geometry, stored=True)
    _half(weights, "p", geometry, stored=False)
    weights[1, 1, 0] = -np.inf
    for stored in (True, False):
        with pytest.raises(UserError, match=r"^p: the router of layer 4 computes gate weights that are not finite"):
            _half(weights, "p", geometry, stored=stored)


def test_pickles_and_an_empty_tokenizer_are_refused_before_work(tmp_path: Path, capfd) -> None:
    pickled = Path(shutil.copytree(SMALL, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    line = failure(capfd, tmp_path / "out", command(tmp_path / "out", "--model", pickled))
    assert line.startswith(f"model {pickled}: has only pickled weights (.bin), which may run code; convert")
    empty = Path(shutil.copytree(SMALL, tmp_path / "empty"))
    (empty / "tokenizer.json").write_text("{}")
    line = failure(capfd, tmp_path / "out", command(tmp_path / "out", "--model", empty))
    assert line == f"model {empty}: its tokenizer files lack 'added_tokens'; give the tokenizer files of the model"


def test_a_folder_for_json_and_too_long_a_text_to_write_are_refused_before_work(tmp_path: Path, capfd) -> None:
    line = failure(capfd, tmp_path / "out", command(tmp_path / "out", "--model", SMALL, "--json", tmp_path))
    assert line == f"--json {tmp_path}: is a folder; name a file, or - for standard output"
    line = failure(capfd, tmp_path / "out", command(tmp_path / "out", "--model", SMALL, "--generate", 100_000))
    assert line.endswith("tokens and 100000 to generate); generate fewer than 1,024 tokens")
