"""A session of ``moe-beyond run``: loading, generating, recording, and comparing with the unmodified model."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moe_beyond.collect.devices import placement
from moe_beyond.collect.load import EXPERTS_FILE, Checkpoint, open_checkpoint
from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.check import Comparison, check_fits_memory, compare
from moe_beyond.runtime.generation import Conversation, Generation, Sampling, TextGenerator
from moe_beyond.runtime.offloading import load_offloaded
from moe_beyond.runtime.records.recording import write_recording
from moe_beyond.runtime.records.summary import replayed_baselines, summary_json, summary_lines, whole_model_bytes
from moe_beyond.runtime.run import OffloadedRun
from moe_beyond.simulator import Result


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session.

    Attributes:
        model: Folder of a model, name of a model that ships with this package, or ``ORG/REPO`` on the Hub.
        revision: Branch, tag or commit on the Hub; None for ``main``.
        device: Device of the model; None for a GPU if there is one, otherwise the CPU.
        dtype: Data type to compute in.
        loading: Other options of `load_offloaded`, by name.
        sampling: Choice of the tokens.
        trace: Folder of the recording to write; None for none.
        predict_log: File for the figures of a predictor that scores without acting; None if it acts.
        source: File or data set of the prompts.
        check: Whether the unmodified model generates the same prompts for a comparison.
    """

    model: str
    revision: str | None
    device: str | None
    dtype: str
    loading: dict[str, Any]
    sampling: Sampling
    trace: Path | None
    predict_log: Path | None
    source: str
    check: bool


@dataclass(frozen=True)
class SessionResult:
    """Results of a session.

    Attributes:
        results: Result of the run, and those of LRU and Belady on its routing.
        geometry: Geometry of the model.
        lines: Speed, times, bytes and memory, for a user.
        figures: Figures that the results lack, as plain values.
        comparison: Comparison with the unmodified model; None without one.
        unwritten: Errors of files that could not be written at the end.
    """

    results: list[Result]
    geometry: Geometry
    lines: list[str]
    figures: dict[str, Any]
    comparison: Comparison | None
    unwritten: list[UserError]


def run_session(
    options: SessionOptions,
    texts: Sequence[Prompt] | Iterator[str],
    stream: IO[str] = sys.stdout,
    notify: Callable[[str], None] = lambda line: None,
    refuse: Callable[[UserError], None] = lambda error: None,
) -> SessionResult | None:
    """Load a model under a memory budget, and generate text.

    Args:
        options: Options of the session.
        texts: Prompts; or an iterator of a user's messages in one conversation.
        stream: Destination of the text.
        notify: Function of a line that a user should read before the text.
        refuse: Function of the error of a message that is too long or no text; the conversation goes on without it.

    Returns:
        Results; None if no text was generated.

    Raises:
        UserError: A prompt is empty or too long, the model cannot be loaded or compared, or an expert cannot be read.
    """
    checkpoint = open_checkpoint(options.model, options.revision)
    if options.check and (checkpoint.folder / EXPERTS_FILE).is_file():
        raise UserError(
            f"--check: needs the unmodified model, and {options.model} is packed; leave --check out, or give the "
            "original checkpoint"
        )
    if checkpoint.has_code:
        notify(f"{options.model}: its code (auto_map) is not run; the model class of transformers is used")
    generator = TextGenerator(checkpoint, options.sampling, stream, keep_logits=options.check)
    if not isinstance(texts, Iterator):
        for prompt in texts:  # before weights are loaded
            generator.token_ids(prompt)
    run = load_offloaded(
        checkpoint, device=options.device, dtype=options.dtype, keep_rows=options.trace is not None,
        predict_only=options.predict_log is not None, **options.loading,
    )  # fmt: skip
    with run:
        if options.check:
            check_fits_memory(whole_model_bytes(run), run.memory())
        for line in run.strategy.notices:
            notify(line)
        if isinstance(texts, Iterator):
            generations = list(_converse(run, generator, texts, refuse))
        else:
            generations = [generator.generate(run.model, prompt) for prompt in texts]
        memory = run.memory()
    if not generations:
        return None
    results = [run.result(), *replayed_baselines(run)]
    lines = summary_lines(run, memory)  # before another model is loaded, whose memory is not the run's
    figures = {**summary_json(run, memory), "generations": [each.to_json() for each in generations]}
    unwritten = list(_write_files(run, options, generations, figures))
    comparison = _compare(checkpoint, options, generations) if options.check else None
    if comparison is not None:
        figures["check"] = comparison.to_json()
    return SessionResult(results, run.geometry, lines, figures, comparison, unwritten)


def _write_files(
    run: OffloadedRun, options: SessionOptions, generations: Sequence[Generation], figures: dict[str, Any]
) -> Iterator[UserError]:
    """Write recording, log of predictions and online updates; yield the errors, so that the figures are shown."""
    try:
        if options.trace is not None:
            write_recording(run, options.trace, generations, options.sampling, options.source, figures)
    except UserError as error:
        yield error
    try:
        if options.predict_log is not None and run.predictions is not None:
            write_json(options.predict_log, run.predictions.to_json())
    except UserError as error:
        yield error
    try:
        if run.online is not None and options.loading.get("online_state") is not None:
            run.online.save(options.loading["online_state"])
    except UserError as error:
        yield error


def _converse(
    run: OffloadedRun, generator: TextGenerator, messages: Iterable[str], refuse: Callable[[UserError], None]
) -> Iterator[Generation]:
    """Generate an answer to each message of a user; each answer reads the whole conversation."""
    conversation = Conversation(generator.tokenizer)
    for message in messages:
        try:
            prompt = conversation.prompt(message)
            generator.token_ids(prompt)
        except UserError as error:
            refuse(error)
            continue
        generation = generator.generate(run.model, prompt)
        conversation.add(message, generation.text)
        yield generation


def _compare(checkpoint: Checkpoint, options: SessionOptions, generations: Sequence[Generation]) -> Comparison:
    """Generate with the unmodified model, and compare."""
    model = checkpoint.load(dtype=options.dtype, device=placement(options.device))
    generator = TextGenerator(checkpoint, options.sampling, keep_logits=True)
    expected = [generator.generate(model, generation.prompt) for generation in generations]
    return compare(
        [each.token_ids for each in generations],
        [each.token_ids for each in expected],
        [each.logits for each in generations if each.logits is not None],
        [each.logits for each in expected if each.logits is not None],
    )
