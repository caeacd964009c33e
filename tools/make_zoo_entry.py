"""Make the pretrained predictors of a model: record, fit, calibrate, evaluate, write cards.

    python tools/make_zoo_entry.py MODEL PROMPTS --out DIR [--name NAME] [--recipe CONFIG ...] [-- OPTION ...]

MODEL and PROMPTS are those of `moe-beyond collect`, and so are the options after `--`. Blocks of prompts are held out
for validation and for testing, unless the prompts name their splits. Each recipe is a configuration that follows
trainer/default and data/traces; the name of its file has the architecture, and a size after it. The validation split
chooses the epoch and calibrates. The test split is measured once, at the end. DIR then has a trace set and one folder
per predictor, named ARCHITECTURE.NAME[-SIZE], which `moe-beyond push` uploads.

After an interruption, the same command goes on: a collection at its next batch, a fit at its last checkpoint. A
finished step is not repeated. An entry with other settings is refused.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout
from parts.commands import run
from parts.fit_figures import best_epoch_tables
from rich.console import Console

from moe_beyond.cli.builtin_configs import find_config
from moe_beyond.cli.options import PIPE_WIDTH
from moe_beyond.collect.prompts import TRAINING, read_prompts
from moe_beyond.errors import UserError
from moe_beyond.files import read_json, read_text, replacing_folder, write_json
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.pretrained import CARD_FILE, folder_figures
from moe_beyond.report.tables.pretrained import pretrained_tables
from moe_beyond.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, PREDICTOR_FOLDER, checkpoints_of
from moe_beyond.safe_text import shown
from moe_beyond.traces.reader import TraceSet

RECIPES = ("zoo/cross_layer", "zoo/cross_layer-small")
"""Predictors of an entry, the large one first."""
SPLITS = (TRAINING, "validation", "test")
BUDGETS = ("10%", "25%")
STRATEGIES = ("--policy", "belief", "--prefetch", "none", "--prefetch", "p>0.5", "--prefetch", "p>0.25")
"""Strategies of the evaluation, next to prefetching of the K best-scored experts. No threshold is tuned."""
BOOTSTRAP = 10_000
SETTINGS_FILE, TIMES_FILE, LOCK_FILE = "settings.json", "seconds.json", "lock"
Settings = dict[str, str | None]
"""Name of a setting -> its value, or the hash of a text."""
CHECKED = "check the upload"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


@dataclass(frozen=True)
class Recipe:
    """A predictor to fit.

    Attributes:
        config: Path of its configuration.
        architecture: Name of the architecture.
        name: Name of the predictor folder.
    """

    config: Path
    architecture: str
    name: str


@dataclass(frozen=True)
class Entry:
    """A zoo entry.

    Attributes:
        out: Folder of the entry.
        model: Model, as for `moe-beyond collect`.
        prompts: Prompts, as for `moe-beyond collect`.
        name: Name of model and data in the names of the predictors.
        recipes: Predictors to fit.
        collect: Options of `moe-beyond collect`, splits included.
        budgets: Memory budgets of the evaluation.
        licence: Licence of the predictors, or None.
    """

    out: Path
    model: str
    prompts: str
    name: str
    recipes: Sequence[Recipe]
    collect: Sequence[str]
    budgets: Sequence[str]
    licence: str | None

    @property
    def traces(self) -> Path:
        """Folder of the trace set."""
        return self.out / "traces"

    def fit_folder(self, recipe: Recipe) -> Path:
        """Return the folder of a fit, with its runs and its log."""
        return self.out / "fits" / recipe.name


@dataclass(frozen=True)
class Step:
    """One step of an entry.

    Attributes:
        title: Name of the step, unique in an entry.
        is_finished: Function that returns whether its result exists.
        run: Function that makes the result, or goes on with it.
        show: Function that prints the figures of the result (default: none).
    """

    title: str
    is_finished: Callable[[], bool]
    run: Callable[[], None]
    show: Callable[[], None] = lambda: None


def make(entry: Entry, settings: Settings, console: Console) -> None:
    """Make the steps that are not finished, and print the figures of all.

    Args:
        entry: Entry to make.
        settings: Settings that the whole entry must have.
        console: Console for titles and figures.

    Raises:
        UserError: The folder has an entry with other settings, or another process makes one there.
        subprocess.CalledProcessError: The command of a step fails.
    """
    check_settings(entry.out, settings)
    entry.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry.out / LOCK_FILE)  # that of a killed process does not block
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{entry.out}: another process makes this entry; wait for it, or stop it") from error
    with lock:
        write_json(entry.out / SETTINGS_FILE, settings)
        steps = list(steps_of(entry, console))
        for number, step in enumerate(steps, start=1):
            title = f"{number}/{len(steps)} {step.title}"
            if step.is_finished():
                console.print(f"{title}: finished earlier")
            else:
                console.print(title)
                began = time.monotonic()
                step.run()
                seconds = read_times(entry.out) | {step.title: round(time.monotonic() - began, 1)}
                write_json(entry.out / TIMES_FILE, seconds)
            step.show()
    summarize(entry, [step.title for step in steps], console)


def steps_of(entry: Entry, console: Console) -> Iterator[Step]:
    """Yield the steps of an entry in order."""
    yield Step("collect", entry.traces.exists, partial(collect, entry), partial(show_splits, entry, console))
    for recipe in entry.recipes:
        yield Step(
            f"fit {recipe.name}",
            partial(has_run, entry.fit_folder(recipe), PREDICTOR_FOLDER),
            partial(fit, entry, recipe),
            partial(show_fit, entry, recipe, console),
        )
        yield Step(f"evaluate {recipe.name}", (entry.out / recipe.name).exists, partial(evaluate, entry, recipe))
    yield Step(CHECKED, lambda: CHECKED in read_times(entry.out), partial(check_upload, entry))


def collect(entry: Entry) -> None:
    """Record the model."""
    words = ("--model", entry.model, "--prompts", entry.prompts, "--out", str(entry.traces))
    run("collect", *words, *entry.collect)


def show_splits(entry: Entry, console: Console) -> None:
    """Print the size of every split."""
    splits = TraceSet(str(entry.traces)).manifest.to_json()["splits"]
    sizes = (f"{name} {splits[name]['tokens']:,}" for name in SPLITS)
    console.print(f"    tokens: {', '.join(sizes)}")


def fit(entry: Entry, recipe: Recipe) -> None:
    """Fit a predictor with its calibration, or resume its fit at the newest checkpoint."""
    folder = entry.fit_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    begun = [run for run in runs_with(folder, CHECKPOINTS_FOLDER) if checkpoints_of(run)]
    words = [word for config in ("trainer/default", "data/traces", str(recipe.config)) for word in ("-c", config)]
    words += [f"--data.traces={entry.traces.absolute()}", "--trainer.enable_progress_bar=false"]
    resumed = ["--resume", str(begun[-1].relative_to(folder))] if begun else words
    run("fit", *resumed, cwd=folder, log=folder / "log")


def show_fit(entry: Entry, recipe: Recipe, console: Console) -> None:
    """Print the figures of the best epoch on the validation split."""
    console.print(*best_epoch_tables([run / METRICS_FILE for run in runs_with(entry.fit_folder(recipe), METRICS_FILE)]))


def evaluate(entry: Entry, recipe: Recipe) -> None:
    """Make the predictor folder: weights in half precision, card, and figures on the test split.

    Raises:
        UserError: The recipe fits another architecture than its name has.
    """
    fitted = runs_with(entry.fit_folder(recipe), PREDICTOR_FOLDER)[-1]
    with replacing_folder(entry.out / recipe.name) as folder:
        run("package", str(fitted), "--out", str(folder), "--half", "--quiet")
        config, card = read_config(folder), folder / CARD_FILE
        if config["architecture"] != recipe.architecture:
            raise UserError(f"{recipe.config}: fits {config['architecture']}; name the file after it")
        card.write_text(with_use(card.read_text(encoding="utf-8"), entry, recipe), encoding="utf-8")
        budgets = [word for budget in entry.budgets for word in ("--budget", budget)]
        best = ("--prefetch", f"top{config['geometry']['top_k']}", "--lookahead", str(config["lookaheads"][0]))
        words = ("--traces", str(entry.traces), "--split", SPLITS[-1], *budgets, *STRATEGIES, *best)
        run("evaluate", str(folder), *words, "--bootstrap", str(BOOTSTRAP), "--record")


def with_use(card: str, entry: Entry, recipe: Recipe) -> str:
    """Return a card with the predictor's name, its licence, the command that made it, and its use."""
    model = model_name(entry.model)
    if entry.licence is not None:
        card = card.replace("\n---\n", f"\nlicense: {entry.licence}\n---\n", 1)
    made = (
        f"- Made by: `python tools/make_zoo_entry.py {model} {Path(entry.prompts).name} --name {entry.name}`, recipe\n"
        f"  `{recipe.config.stem}`, one seed. The validation split made every choice, and the test split none.\n"
    )
    use = (
        "```sh\n"
        f"moe-beyond run --model {model} --budget {entry.budgets[-1]} --policy belief --max-new-tokens 16 \\\n"
        f'    --predictor {recipe.name} --prompt "import os"\n'
        "```\n\n"
    )
    card = re.sub(r"^# .*$", f"# {recipe.name}", card, count=1, flags=re.MULTILINE)
    card = card.replace("\n## Figures\n", f"{made}\n## Figures\n", 1)
    return card.replace("## Use and limits\n\n", f"## Use and limits\n\n{use}", 1)


def check_upload(entry: Entry) -> None:
    """Check that every folder can be uploaded."""
    for folder, repository in uploads(entry).items():
        run("push", str(folder), repository, "--dry-run", "--quiet")


def uploads(entry: Entry) -> dict[Path, str]:
    """Return the folders to upload and their repositories, without the name of the user."""
    predictors = {entry.out / recipe.name: f"ORG/{recipe.name}" for recipe in entry.recipes}
    return {entry.traces: f"ORG/{entry.name}", **predictors}


def summarize(entry: Entry, titles: Sequence[str], console: Console) -> None:
    """Print the figures of all predictors, the commands that upload them, and the durations of the steps."""
    console.print(*pretrained_tables([folder_figures(entry.out / recipe.name) for recipe in entry.recipes]))
    for folder, repository in uploads(entry).items():
        console.print(f"ready: moe-beyond push {folder} {repository}", soft_wrap=True)
    seconds = read_times(entry.out)
    times = ", ".join(f"{title} {seconds[title]:,.0f} s" for title in titles if title in seconds)
    console.print(f"times: {times}", soft_wrap=True)


def read_times(out: Path) -> dict[str, float]:
    """Return the duration of each finished step in seconds, in the session that finished it."""
    path = out / TIMES_FILE
    times: dict[str, float] = read_json(path) if path.exists() else {}
    return times


def runs_with(folder: Path, part: str) -> list[Path]:
    """Return the runs of a fit that have a file or folder, the newest last."""
    found = (path.parent for path in folder.glob(f"runs/*/version_*/{part}"))
    return sorted(found, key=lambda run: int(run.name.rpartition("_")[2]))


def has_run(folder: Path, part: str) -> bool:
    """Return whether a fit has a run with a file or folder."""
    return bool(runs_with(folder, part))


def check_settings(out: Path, settings: Settings) -> None:
    """Compare settings with those of an entry that was begun.

    Args:
        out: Folder of the entry.
        settings: Settings of this command.

    Raises:
        UserError: The folder holds something else, or an entry with another value.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - {LOCK_FILE}):
            raise UserError(f"{out}: is no zoo entry; choose another --out")
        return
    earlier = read_json(path)
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise UserError(
                f"{out}: contains an entry with other {name} (got {shown(value)}, not {shown(earlier.get(name))}); "
                "repeat its command, or choose another --out"
            )


def read_recipe(config: str, entry: str) -> Recipe:
    """Find a recipe, and derive the name of its predictor from that of its file.

    Args:
        config: File, or name of a built-in configuration.
        entry: Name of the entry.

    Raises:
        UserError: There is no such configuration, or its name has no architecture.
    """
    try:
        path = find_config(config).resolve()
    except UserError as error:
        raise UserError(f"--recipe {config}: {error}") from error
    found = [name for name in ARCHITECTURES if re.search(rf"(^|-){name}(-|$)", path.stem)]
    if not found:
        raise UserError(f"--recipe {config}: its name has no architecture; name it [PREFIX-]ARCHITECTURE[-SIZE].yaml")
    size = path.stem.rpartition(found[0])[2]
    return Recipe(path, found[0], f"{found[0]}.{entry}{size}")


def model_name(model: str) -> str:
    """Return the name of a model without a path of this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def default_name(model: str, prompts: str) -> str:
    """Return the name of an entry without ``--name``: model and prompts, such as ``small-moe-python``."""
    words = f"{Path(model_name(model)).name}-{Path(prompts).stem}".lower()
    return re.sub(r"[^a-z0-9-]+", "-", words).strip("-")


def read_entry(args: argparse.Namespace) -> tuple[Entry, Settings]:
    """Return the entry of the options, and the settings that all its sessions must have.

    Raises:
        UserError: A prompt or a recipe cannot be read, two predictors have one name, or a split has no prompt.
    """
    name = args.name or default_name(args.model, args.prompts)
    recipes = [read_recipe(config, name) for config in args.recipe]
    names = [recipe.name for recipe in recipes]
    if twice := [each for each in names if names.count(each) > 1]:
        raise UserError(f"--recipe: two predictors are named {twice[0]}; rename a recipe")
    prompts = list(islice(read_prompts(args.prompts), args.max_prompts))
    splits = {prompt.split for prompt in prompts} - {TRAINING}
    if splits and (missing := [split for split in SPLITS if split not in (TRAINING, *splits)]):
        raise UserError(f"{args.prompts}: has splits, but no {missing[0]}; give prompts of {', '.join(SPLITS)}")
    options = [] if splits else ["--val-blocks", args.blocks, "--test-blocks", args.blocks]
    options += [] if args.max_prompts is None else ["--max-prompts", str(args.max_prompts)]
    options += args.collect
    texts = json.dumps([(prompt.sequence_id, prompt.split, prompt.text) for prompt in prompts])
    settings = {
        "model": args.model,
        "prompts": digest(texts),
        "name": name,
        "recipes": " ".join(names),
        **{f"settings of {recipe.name}": digest(read_text(recipe.config)) for recipe in recipes},
        "options of collect": " ".join(options),
        "budgets": " ".join(args.budget),
        "licence": args.licence,
    }
    out = Path(args.out)
    return Entry(out, args.model, args.prompts, name, recipes, options, args.budget, args.licence), settings


def digest(text: str) -> str:
    """Return the SHA-256 hash of a text as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options; those after ``--`` are for `moe-beyond collect`."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model, as for `moe-beyond collect`")
    parser.add_argument("prompts", metavar="PROMPTS", help="prompts, as for `moe-beyond collect`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the entry")
    parser.add_argument("--name", help="name of model and data in the predictors' names (default: MODEL-PROMPTS)")
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="CONFIG",
        help=f"configuration of a predictor, repeatable (default: {' and '.join(RECIPES)})",
    )
    parser.add_argument(
        "--budget",
        action="append",
        metavar="BUDGET",
        help="memory budget of the evaluation, repeatable (default: 10%% and 25%%)",
    )
    parser.add_argument(
        "--blocks",
        default="20:10",
        metavar="SIZE:EVERY",
        help="blocks of consecutive prompts for validation and for testing, if prompts have no splits (default: 20:10)",
    )
    parser.add_argument("--max-prompts", type=int, metavar="N", help="use only the first N prompts (default: all)")
    parser.add_argument("--licence", metavar="ID", help="licence of the predictors, for their cards (default: none)")
    args = parser.parse_args(argv[:end])
    args.collect, args.recipe, args.budget = argv[end + 1 :], args.recipe or RECIPES, args.budget or list(BUDGETS)
    return args


def main() -> None:
    """Parse the options and make the entry."""
    args, console = parse(sys.argv[1:]), Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    tool = Path(__file__).name
    try:
        make(*read_entry(args), console)
    except UserError as error:
        print(f"{tool}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except subprocess.CalledProcessError as error:  # the command has printed the reason
        raise SystemExit(max(1, error.returncode)) from error
    except KeyboardInterrupt as error:
        print(f"{tool}: interrupted; the same command goes on with {args.out}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


if __name__ == "__main__":
    main()
