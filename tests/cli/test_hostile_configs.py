"""Configurations of strangers: none runs a command, and each is refused with a line that names the file or option."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from _helpers.common import failure, tiny_traces
from _helpers.fitting import TINY_CROSS_LAYER

from moe_beyond.cli.allowed_classes import allowed_classes
from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.report.html.subject import run_config_to_show
from moe_beyond.yaml_files import MAX_BYTES, MAX_VALUES

REFUSED = "is not a class that a configuration may name; if you trust its author, add --trust-config"
COMMAND = "touch PWNED"
RUNS = {"class_path": "subprocess.getoutput", "init_args": {"cmd": COMMAND}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": COMMAND, "shell": True}}
LOADS = {
    "class_path": "moe_beyond.tasks.CrossLayerTask.load_from_checkpoint",
    "init_args": {"checkpoint_path": "evil.ckpt", "weights_only": False},
}
MAIN = {"class_path": "moe_beyond.cli.main.main", "init_args": {"argv": ["quickstart", "--out", "PWNED"]}}
IMPORTS = {"class_path": "theirs.Task"}
THEIR_MODULE = "from pathlib import Path\n\nPath('PWNED').touch()\n\n\nclass Task: ...\n"
CALLBACKS = "lightning.pytorch.callbacks"


def callback(name: str, **arguments: object) -> dict[str, object]:
    return {"trainer": {"callbacks": [{"class_path": f"{CALLBACKS}.{name}", "init_args": arguments}]}}


CLASSES = [RUNS, POPEN, LOADS, MAIN, IMPORTS]
PLACES = {
    "model": lambda spec: {"model": spec},
    "data": lambda spec: {"data": spec},
    "an argument of the model": lambda spec: {"model": {"class_path": "CrossLayerTask", "init_args": {"width": spec}}},
    "a callback": lambda spec: {"trainer": {"callbacks": spec}},
    "a list of callbacks": lambda spec: {"trainer": {"callbacks": [{"class_path": "ExportBest"}, spec]}},
    "an argument of a callback": lambda spec: callback("ModelCheckpoint", dirpath=spec),
    "a function of a callback": lambda spec: callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn=spec),
    "free arguments of a callback": lambda spec: callback("WeightAveraging", avg_fn=spec),
    "LambdaCallback": lambda spec: callback("LambdaCallback", setup=spec),
    "a logger": lambda spec: {"trainer": {"logger": [spec]}},
    "an argument of a logger": lambda spec: {
        "trainer": {"logger": {"class_path": "WandbLogger", "init_args": {"experiment": spec}}}
    },
    "free arguments of a class": lambda spec: {
        "trainer": {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}, "dict_kwargs": {"x": spec}}}
    },
    "a profiler": lambda spec: {"trainer": {"profiler": spec}},
    "a strategy": lambda spec: {"trainer": {"strategy": spec}},
    "a function of a strategy": lambda spec: {
        "trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_hook": spec}}}
    },
    "an object of a strategy": lambda spec: {
        "trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": spec}}}
    },
    "an accelerator": lambda spec: {"trainer": {"accelerator": spec}},
    "a plugin": lambda spec: {"trainer": {"plugins": [spec]}},
    "an optimizer": lambda spec: {"model": {"class_path": "CrossLayerTask", "init_args": {"optimizer": spec}}},
    "an option that takes no class": lambda spec: {"ckpt_path": spec},
}
"""Place of a class in a configuration -> the configuration."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the stranger, which Python would find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs.py").write_text(THEIR_MODULE)
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_no_class_of_a_stranger_is_built_wherever_it_is_named(place: str, here: Path, capsys) -> None:
    for number, spec in enumerate(CLASSES):
        Path("theirs.yaml").write_text(yaml.safe_dump(PLACES[place](spec)))
        verb = ("fit", "validate", "test", "predict")[number % 4]
        line = failure(capsys, here, [verb, "-c", "theirs.yaml"])
        named = "LambdaCallback" if place == "LambdaCallback" else spec["class_path"]
        assert line == f"theirs.yaml: class_path {f'{CALLBACKS}.{named}' if named == place else named}: {REFUSED}"
        assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "place",
    [
        *("model", "data", "a callback", "a list of callbacks", "a logger", "a plugin"),
        *("a function of a callback", "a function of a strategy"),
    ],
)
@pytest.mark.parametrize("path", ["os.system", "theirs.Task", f"{CALLBACKS}.LambdaCallback", MAIN["class_path"]])
def test_no_function_of_a_stranger_is_called_by_its_name(place: str, path: str, here: Path, capsys) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(PLACES[place](path)))
    line = failure(capsys, here, ["fit", "-c", "theirs.yaml"])
    assert line.startswith("theirs.yaml: ")
    assert line.endswith(f"class_path {path}: {REFUSED}")
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--model=subprocess.Popen"], "--model: class_path subprocess.Popen"),
        (["--model", "theirs.Task"], "--model: class_path theirs.Task"),
        (["--data=os.system"], "--data: class_path os.system"),
        ([f"--trainer.callbacks+={CALLBACKS}.LambdaCallback"], f"--trainer.callbacks: class_path {CALLBACKS}.Lambda"),
        (["--trainer.callbacks+=LambdaCallback"], f"--trainer.callbacks: class_path {CALLBACKS}.LambdaCallback"),
        (["--trainer.callbacks+=theirs.Task"], "--trainer.callbacks: class_path theirs.Task"),
        (["--trainer.logger={class_path: os.system}"], "--trainer.logger: class_path os.system"),
        (["--trainer.plugins", "[{class_path: os.system}]"], "--trainer.plugins: class_path os.system"),
        (["-c", "{trainer: {logger: {class_path: os.system}}}"], "-c: class_path os.system"),
        (
            ["--model=CrossLayerTask", "--model.init_args.width={class_path: os.system}"],
            "--model.init_args.width: class",
        ),
        (["--trainer={logger: {class_path: os.system}}"], "--trainer: class_path os.system"),
        (["--trainer.logger.class_path=os.system"], "--trainer.logger"),
    ],
)
def test_an_option_builds_no_other_class_either(words: list[str], start: str, here: Path, capsys) -> None:
    line = failure(capsys, here, ["fit", *words])
    assert line.startswith(start)
    assert line.endswith(REFUSED)


def test_a_configuration_within_a_configuration_is_read_with_the_same_care(here: Path, capsys) -> None:
    Path("inner.yaml").write_text(yaml.safe_dump(PLACES["LambdaCallback"](RUNS)))
    Path("callback.yaml").write_text(yaml.safe_dump(callback("LambdaCallback", setup=RUNS)["trainer"]["callbacks"][0]))
    for content in ({"config": "inner.yaml"}, {"trainer": "inner.yaml"}, {"trainer": {"callbacks": ["callback.yaml"]}}):
        Path("outer.yaml").write_text(yaml.safe_dump(content))
        assert failure(capsys, here, ["fit", "-c", "outer.yaml"]).startswith("outer.yaml: ")
        assert not Path("PWNED").exists()
    assert failure(capsys, here, ["fit", "--trainer.callbacks=callback.yaml"]).endswith(REFUSED)


def test_a_file_cannot_trust_itself(here: Path, capsys, tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces")
    Path("theirs.yaml").write_text("trust_config: true")
    words = ["-c", "theirs.yaml", "-c", "model/cross_layer", "-c", "data/traces", "--data.traces=traces"]
    assert failure(capsys, here, ["fit", *words]) == (
        "theirs.yaml: trust_config: a file cannot trust itself; give --trust-config on the command line"
    )


def test_every_allowed_class_exists_and_none_calls_what_an_argument_names() -> None:
    names = {cls.__name__ for cls in allowed_classes().values()}
    assert {"CrossLayerTask", "TraceDataModule", "CacheReplay", "ModelCheckpoint", "WandbLogger"} <= names
    assert not {"LambdaCallback", "ThroughputMonitor", "ModelPruning", "PyTorchProfiler"} & names


@pytest.mark.slow
def test_with_trust_a_configuration_may_name_any_class(here: Path) -> None:
    tiny_traces(here / "traces")
    Path("mine.py").write_text(
        "from pathlib import Path\n\nimport lightning as L\n\n\n"
        "class Touch(L.Callback):\n    def on_fit_start(self, *_):\n        Path('TOUCHED').touch()\n"
    )
    Path("mine.yaml").write_text("trainer: {callbacks: [{class_path: mine.Touch}], max_epochs: 1, logger: false}")
    words = ["-c", "mine.yaml", "-c", "model/cross_layer", "-c", "data/traces", "--data.traces=traces"]
    command = [sys.executable, "-m", "moe_beyond", "fit", *words, *TINY_CROSS_LAYER]
    for more, code in ([], 2), (["--trust-config"], 0):
        ended = subprocess.run([*command, *more], capture_output=True, text=True, check=False, env=os.environ)
        assert ended.returncode == code, ended.stderr
        assert Path("TOUCHED").exists() == (code == 0)
    assert main(["evaluate", next(map(str, Path().glob("runs/*/version_0")))]) == 0


ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
)
"""A text of 400 characters with a billion values once its aliases are expanded."""
MERGES = "\n".join(
    ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
)
MANY = f"has more than {MAX_VALUES:,} values, with its aliases expanded; write fewer"
DEEP = "nests values more than 50 deep; flatten them"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ALIASES, MANY),
        (MERGES, MANY),
        ("a: &a [*a]", MANY),
        (yaml.safe_dump({"seed_everything": ALIASES}), MANY),
        (yaml.safe_dump({"trainer": {"max_epochs": ALIASES}}), MANY),
        ("[" * 100_000, DEEP),
        ("trainer: {max_epochs: '" + "[" * 100_000 + "'}", DEEP),
        ("- " * 100_000, DEEP),
        ("x: [" + "0," * MAX_VALUES + "0]", MANY),
        ("x" * (MAX_BYTES + 1), f"is larger than {MAX_BYTES:,} bytes; name a configuration"),
        ("x: " + "9" * 5000, "is not YAML (Exceeds the limit"),
        ("x: 2001-99-99\ny: !!timestamp 2001-99-99", "is not YAML ("),
        ("x: !!python/object/apply:os.system [touch PWNED]", "is not YAML (could not determine a constructor"),
    ],
    ids=lambda value: value[:20],
)
def test_a_text_that_expands_is_refused_at_once(text: str, line: str, here: Path, capsys) -> None:
    Path("c.yaml").write_text(text)
    began = time.monotonic()
    said = failure(capsys, here, ["fit", "-c", "c.yaml"])
    assert time.monotonic() - began < 20  # most of it imports
    assert said.startswith("c.yaml")
    assert line in said
    assert not Path("PWNED").exists()


def test_no_pipe_or_device_is_read(here: Path, capsys) -> None:
    os.mkfifo("pipe")
    regular = "is not a regular file; name a file"
    for name in ("pipe", "/dev/zero"):
        assert failure(capsys, here, ["fit", "-c", name]) == f"{name}: {regular}"
    Path("c.yaml").write_text("model: pipe")
    assert failure(capsys, here, ["fit", "-c", "c.yaml"]) == "c.yaml: 'pipe' is a pipe; name a file"
    assert failure(capsys, here, ["fit", "--model=pipe"]) == "--model: 'pipe' is a pipe; name a file"
    os.mkfifo("config.yaml")
    Path("checkpoints").mkdir()
    os.mkfifo("checkpoints/last.ckpt")
    words = ["--traces", "nowhere"]
    assert failure(capsys, here, ["evaluate", "."]).startswith("config.yaml: is not a regular file")
    assert "not a regular file" in failure(capsys, here, ["package", "checkpoints/last.ckpt", "--out", "new"])
    assert failure(capsys, here, ["replay", "--config", "pipe", *words]).startswith("--config pipe: is no file")


@pytest.mark.parametrize(
    "text", ["data: 5", "[1, 2]", "data: {init_args: 3}", "data: [1", "", "trainer: x", "data: !!x"]
)
def test_a_broken_configuration_of_a_run_is_a_line(text: str, here: Path, capsys) -> None:
    run = here / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    for line in (failure(capsys, here, ["evaluate", "run"]), failure(capsys, here, ["fit", "-c", "run/config.yaml"])):
        assert line.startswith("run/config.yaml")
    with pytest.raises(UserError, match=r"^run/config\.yaml"):
        run_config_to_show(Path("run"))
