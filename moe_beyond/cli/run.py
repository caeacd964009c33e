"""``moe-beyond run``."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cache.misses import MISSES, MOVE
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.prefetchers import PREFETCHERS, parse_prefetch
from moe_beyond.cli.options import MODEL_HELP, REVISION_HELP, Output, check_file, command_parser
from moe_beyond.cli.parser import CommandParser
from moe_beyond.cli.replay_options import DEVICE_HELP, PREDICTOR_HELP, add_online, check_online, choices, quoted
from moe_beyond.cli.strategy_config import add_config, apply_config, given_options
from moe_beyond.collect.config import DTYPES
from moe_beyond.collect.out_folder import check_out
from moe_beyond.collect.prompts import COLUMNS, Prompt, as_prompts, read_prompts
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.options import DEFAULT_BUDGET, SCOPES
from moe_beyond.messages import print_error
from moe_beyond.runtime.options import FUTURE_POLICIES, READERS, TIERS
from moe_beyond.safe_text import printable

LOADING = (
    "budget", "policy", "predictor", "prefetch", "lookahead", "profile", "scope", "misses", "online",
    "online_state", "tier", "direct_io", "readers",
)  # fmt: skip
"""Options that `moe_beyond.load_offloaded` has, too."""
CHOSEN = ("config", "policy", "prefetch", "lookahead", "scope")
"""Options that exclude ``--auto``."""
_PREFETCHES = tuple(text for each in PREFETCHERS.values() if not each.knows_future for text in each.examples)
"""Examples of prefetchers that a run accepts."""


def build_parser() -> CommandParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "run",
        "Run a mixture-of-experts model of transformers under a memory budget for its experts, and generate text. "
        "Experts are read when they are needed; the output equals that of the unmodified model, up to rounding with "
        "--misses cpu or best. The text appears as it "
        "is generated, then measured figures next to LRU and Belady, replayed on the same routing. tok/s counts the "
        "tokens of forwards that read one token; the prompt is prefill. With --quiet only the text is printed; with "
        "--json - the text goes to standard error.",
        "moe-beyond run --model small-moe --budget 25% --policy belief --predictor cross_layer.small-moe-python-small "
        '--prompt "import os" --max-new-tokens 64',
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help=MODEL_HELP,
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help=REVISION_HELP,
    )
    _add_text(parser)
    _add_strategy(parser)
    add_online(parser, "the prompts and of the generated text")
    _add_choice(parser)
    parser.add_argument(
        "--tier",
        default="disk",
        metavar="TIER",
        help="place of experts without a slot: disk reads them from the model's files, host keeps all of them in host "
        "memory (default: disk)",
    )
    parser.add_argument(
        "--direct-io", action="store_true", help="read experts without the page cache of the operating system"
    )
    parser.add_argument(
        "--readers", type=int, default=READERS, metavar="N", help=f"threads that read experts (default: {READERS})"
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:1 (default: a GPU if there is one, otherwise cpu)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help=f"data type to compute in: {', '.join(DTYPES)} (default: auto, as stored)",
    )
    parser.add_argument(
        "--trace",
        metavar="DIR",
        help="trace set to write, with the telemetry of every layer; `moe-beyond replay --as-run` repeats it",
    )
    parser.add_argument(
        "--predict-log",
        metavar="FILE",
        help="JSON file for the recall and the gate mass of the predictor, which then does not act, and the bytes that "
        "its prefetches would move, by layer (default: the predictor acts)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="then generate with the unmodified model, loaded whole, and compare tokens and logits; exit code 1 if "
        "they differ",
    )
    parser.epilog = f"{parser.epilog}\n\nmoe_beyond.load_offloaded does the same in Python."
    return parser


def _add_text(parser: ArgumentParser) -> None:
    """Add the options of prompts and sampling."""
    parser.add_argument("--prompt", metavar="TEXT", help="text that the model continues")
    parser.add_argument(
        "--prompts",
        metavar="PROMPTS",
        help="prompts, one after another: a .txt file with one prompt per line; a .jsonl, .json, .csv, .tsv or "
        f".parquet file, FILE[:COLUMN] (default column: the first of {', '.join(COLUMNS)}); or a data set, "
        "ORG/NAME[:SPLIT[:COLUMN]]",
    )
    parser.add_argument("--max-prompts", type=int, metavar="N", help="use only the first N prompts (default: all)")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="read messages from standard input, one per line, until an empty line; each answer reads the whole "
        "conversation",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate per prompt (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="TEMPERATURE",
        help="sampling temperature; 0 chooses the most probable token (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="random seed for sampling (default: 0)")


def _add_strategy(parser: ArgumentParser) -> None:
    """Add the options of the budget and the strategy."""
    parser.add_argument(
        "--budget",
        default=DEFAULT_BUDGET,
        metavar="BUDGET",
        help=f"memory budget for experts: 10% of all experts, 166 slots, 2.9GB or 2.7GiB (default: {DEFAULT_BUDGET})",
    )
    policies = (name for name in POLICIES if name not in FUTURE_POLICIES)
    parser.add_argument(
        "--policy",
        default="lru",
        metavar="POLICY",
        help=f"eviction policy that needs no future: {choices(policies)} (default: lru)",
    )
    parser.add_argument(
        "--predictor", metavar="PREDICTOR", help=f"predictor whose scores are used: {PREDICTOR_HELP} (default: none)"
    )
    parser.add_argument(
        "--prefetch",
        metavar="PREFETCHER",
        help=f"prefetcher: {choices(map(quoted, _PREFETCHES))}; quote it, because a shell reads > as a redirection "
        "(default: top<K> with a predictor, none without)",
    )
    parser.add_argument(
        "--lookahead",
        metavar="LOOKAHEAD",
        help="lookahead of the scores that the prefetcher selects by: computed (once the layer before is computed), 1 "
        "(once it is routed), 2, ..., token (before the token's first layer) (default: the predictor's first)",
    )
    parser.add_argument(
        "--profile",
        metavar="PREDICTOR",
        help="fitted history or popularity predictor for policies that need a usage profile (default: none)",
    )
    parser.add_argument(
        "--scope",
        default="global",
        metavar="SCOPE",
        help=f"scope of the cache: {' or '.join(SCOPES)} (default: global)",
    )
    parser.add_argument(
        "--misses",
        default=MOVE,
        metavar="HANDLING",
        help="miss handling: move copies a missing expert into a slot; cpu computes it on the host; best does the "
        "sooner of both. With cpu and best, --tier host is needed and the output equals the model's up to rounding "
        f"(default: {MOVE})",
    )


def _add_choice(parser: ArgumentParser) -> None:
    """Add the options of a tuned strategy."""
    add_config(parser)
    parser.add_argument(
        "--auto",
        nargs="?",
        const="",
        metavar="DIR",
        help="tune policy, prefetcher, lookahead and scope on this recording, as `moe-beyond tune` does for tokens per "
        "second; without DIR the first prompts of --prompts run with lru and are recorded, and the others run with the "
        "choice (default: no tuning)",
    )
    parser.add_argument("--device-model", metavar="DEVICE", help=f"for --auto, {DEVICE_HELP} (default: none)")


def main(argv: list[str]) -> None:
    """Run a model under a memory budget.

    Args:
        argv: The command and its options.
    """
    parser = build_parser()
    args = parser.parse_args(argv[1:])
    apply_config(args, parser.given)
    _check(args)
    _check_auto(args, given_options(parser.given))
    output = Output(args)
    if args.trace:
        check_out(Path(args.trace))
    check_file("--predict-log", args.predict_log)
    # Imported here, so that help and completion do not wait for them.
    from moe_beyond.report.tables.results import results_table
    from moe_beyond.runtime.auto import AutoOptions, run_auto
    from moe_beyond.runtime.generation import Sampling
    from moe_beyond.runtime.session import SessionOptions, run_session

    def notify(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr)

    options = SessionOptions(
        args.model, args.revision, args.device, args.dtype, loading={name: args[name] for name in LOADING},
        sampling=Sampling(args.max_new_tokens, args.temperature, args.seed),
        trace=Path(args.trace) if args.trace else None,
        predict_log=Path(args.predict_log) if args.predict_log else None, source=_source(args), check=args.check,
    )  # fmt: skip
    texts = _messages() if args.chat else _prompts(args, notify)
    refused: list[UserError] = []

    def refuse(error: UserError) -> None:
        print_error(error)
        refused.append(error)

    stream = sys.stderr if args.json == "-" else sys.stdout
    if args.auto is None:
        session = run_session(options, texts, stream, notify, refuse)
    else:
        session = run_auto(options, AutoOptions(args.auto or None, args.device_model), texts, stream, notify, refuse)
    if session is None:
        raise SystemExit(2 if refused else 0)
    first, *baselines = session.results
    rows = [replace(first, strategy=f"this run: {first.strategy}"), *baselines]
    output.show("", results_table(rows, session.geometry), *session.lines)
    if session.comparison is not None:
        output.show(str(session.comparison))
    output.result({"results": [result.to_json() for result in session.results], "run": session.figures})
    for error in session.unwritten:
        print_error(error)
    if session.unwritten:
        raise SystemExit(2)
    if session.comparison is not None and not session.comparison.identical:
        raise SystemExit(1)


def _messages() -> Iterator[str]:
    """Yield the lines of standard input until an empty one; a byte that is no UTF-8 becomes half a character."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _prompts(args: Namespace, notify: Callable[[str], None]) -> list[Prompt]:
    """Return the prompts of the options."""
    if args.prompt is not None:
        return as_prompts([args.prompt])
    prompts = list(islice(read_prompts(args.prompts, notify), args.max_prompts))
    if not prompts:
        raise UserError(f"{args.prompts}: has no prompts; give a file or data set with at least one")
    return prompts


def _source(args: Namespace) -> str:
    """Return the name of the prompts' file or data set, without a path of this machine."""
    if args.prompts is None:
        return "chat" if args.chat else "prompt"
    return printable(Path(args.prompts).name) if Path(args.prompts).is_file() else str(args.prompts)


def _check_auto(args: Namespace, given: set[str]) -> None:
    """Refuse options that exclude ``--auto``, before a model is loaded.

    Raises:
        UserError: The device is missing, or an option is given that the choice sets.
    """
    if args.auto is None:
        if args.device_model is not None:
            raise UserError("--device-model: is the device of --auto; give --auto, or leave it out")
        return
    if args.device_model is None:
        raise UserError("--auto: needs the device of the timing model; add --device-model DEVICE")
    for name in CHOSEN:
        if name in given:
            raise UserError(f"--{name}: --auto chooses it; leave one of them out")


def _check(args: Namespace) -> None:
    """Refuse wrong values of options before a model is loaded.

    Raises:
        UserError: A value is wrong, or two options exclude each other.
    """
    texts = {"--prompt": args.prompt is not None, "--prompts": args.prompts is not None, "--chat": args.chat}
    given = [option for option, is_given in texts.items() if is_given]
    if len(given) != 1:
        raise UserError(
            f"run: needs one source of text (got {' and '.join(given) or 'none'}); give one of {', '.join(texts)}"
        )
    for option, value, values in (
        ("--tier", args.tier, TIERS),
        ("--dtype", args.dtype, DTYPES),
        ("--scope", args.scope, SCOPES),
        ("--policy", args.policy, POLICIES),
        ("--misses", args.misses, MISSES),
    ):
        if value not in values:
            raise unknown(option, value, values)
    if args.prefetch is not None:
        parse_prefetch(args.prefetch)
    for option, number in (("--max-prompts", args.max_prompts), ("--readers", args.readers)):
        if number is not None and number < 1:
            raise UserError(f"{option}: must be at least 1 (got {number})")
    if args.predict_log is not None and args.predictor is None:
        raise UserError("--predict-log: needs a predictor to score (got none); give --predictor")
    if args.misses != MOVE and args.tier != "host":
        raise UserError(
            f"--misses {args.misses}: the host computes experts from its memory (got --tier {args.tier}); add --tier "
            "host"
        )
    if args.misses != MOVE and args.check:
        raise UserError(
            f"--check: compares bit by bit, and --misses {args.misses} rounds differently; leave one of them out"
        )
    check_online(args)
    if args.online and args.auto is not None:
        raise UserError("--online: --auto chooses by scores without updates; leave one of them out")
    if args.online and args.predictor is None:
        raise UserError("--online: corrects the scores of a predictor (got none); give --predictor")
    if args.max_prompts is not None and args.prompts is None:
        raise UserError("--max-prompts: needs --prompts; leave it out")
