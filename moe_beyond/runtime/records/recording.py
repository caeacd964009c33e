"""The recording of a run: a trace set of its sequences, its telemetry, and its settings.

The folder is a trace set with two additions: ``run.json`` has the settings and figures of the run, and the folder
``telemetry`` has one Parquet file each for forwards (``steps``), layers (``events``), ``prefetches`` and ``transfers``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_beyond.collect.tokenizer_files import recorded_tokenizer
from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.files import check_seal, file_in, read_json, replacing_folder, sealed, write_json
from moe_beyond.json_fields import OBJECT, SHA256, TEXT, FieldRule, build, check_fields, check_present, optional
from moe_beyond.pretrained import list_pretrained
from moe_beyond.runtime.generation import Generation, Sampling
from moe_beyond.runtime.options import RUN_FILE
from moe_beyond.runtime.records.telemetry_files import ROWS, read_telemetry, write_telemetry
from moe_beyond.runtime.result import logged_sequences
from moe_beyond.runtime.stepping.telemetry import EventRow, PrefetchRow, StepRow, TransferRow
from moe_beyond.runtime.strategy import StrategyOptions
from moe_beyond.safe_text import shown
from moe_beyond.traces.manifest import TOKENIZER_FILE
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

if TYPE_CHECKING:
    from moe_beyond.runtime.run import OffloadedRun

FORMAT_VERSION = 1
ONLINE_FILE, ONLINE_START_FILE = "online.safetensors", "online_start.safetensors"
"""Files of online updates at the end of a run, and at its start if they were not empty."""
ROLES = ("predictor", "profile")
"""Options that name a predictor."""
FIELDS = {
    "traces": SHA256,
    "telemetry": FieldRule(
        f"an object with the hashes of {', '.join(ROWS)}",
        lambda value: OBJECT.accepts(value) and set(value) == set(ROWS) and all(map(SHA256.accepts, value.values())),
    ),
    "options": OBJECT,
    "fingerprints": FieldRule(
        f"an object with the hashes of {' and '.join(ROLES)}",
        lambda value: (
            OBJECT.accepts(value) and set(value) <= set(ROLES) and all(map(optional(SHA256).accepts, value.values()))
        ),
    ),
}
"""Fields of ``run.json`` that are read again."""


@dataclass(frozen=True)
class Recording:
    """A recorded run.

    Attributes:
        traces: Sequences that the model read, in order.
        options: Options that chose the strategy, with the budget in slots. A predictor and a profile have the name of
            their folder; None for an instance.
        fingerprints: ``"predictor"`` and ``"profile"`` -> sha256 of the weights, None for an instance; absent without
            one.
        steps: Forwards of the model.
        events: Layers of the forwards.
        prefetches: Moments at which a prefetch could begin.
        transfers: Transfers in the order of their arrival.
    """

    traces: TraceSet
    options: StrategyOptions
    fingerprints: Mapping[str, str | None]
    steps: list[StepRow]
    events: list[EventRow]
    prefetches: list[PrefetchRow]
    transfers: list[TransferRow]


def write_recording(
    run: "OffloadedRun",
    out: str | Path,
    generations: Sequence[Generation],
    sampling: Sampling,
    source: str,
    figures: dict[str, Any],
) -> None:
    """Write the recording of a run whose telemetry has rows; the complete folder appears at the end.

    Args:
        run: Run that was loaded with a tokenizer.
        out: Folder to make.
        generations: Prompts and texts of the run, one per sequence and in their order.
        sampling: Choice of the tokens.
        source: File or data set of the prompts.
        figures: Figures of the run as plain values.

    Raises:
        UserError: The folder exists, or a forward is no step of a replay.
    """
    assert run.tokenizer is not None, "a run that generates text has a tokenizer"
    generation = {"tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        generation["seed"] = sampling.seed
    manifest = replace(
        run.manifest, author="mixed", source=source, hidden_size=None, states=None, generation=generation
    )
    tokenizer = recorded_tokenizer(run.model, run.tokenizer)
    sequences = logged_sequences(run.log, run.geometry)
    with replacing_folder(out) as folder, TemporaryDirectory() as elsewhere:
        vocabulary = tokenizer.file or Path(elsewhere) / TOKENIZER_FILE
        if tokenizer.file is None:
            vocabulary.write_bytes(tokenizer.content)
        with open_writer(folder, manifest, vocabulary=vocabulary) as writer:
            for logged, sequence, each in zip(run.log.sequences, sequences, generations, strict=True):
                ids = np.concatenate(logged.token_ids).astype(np.int32)
                prompt = each.prompt
                writer.write(
                    Trace(prompt.sequence_id, prompt.source, ids, sequence.experts, sequence.decode_start),
                    prompt.split,
                )
        hashes = write_telemetry(folder, run.telemetry)
        if run.online is not None:
            run.online.save(folder / ONLINE_FILE)
        if run.strategy.online_start is not None:
            run.strategy.online_start.save(folder / ONLINE_START_FILE)
        content = {
            "format_version": FORMAT_VERSION,
            "traces": TraceSet(str(folder)).manifest.fingerprint,
            "telemetry": hashes,
            "options": _options_json(run),
            "fingerprints": dict(run.strategy.fingerprints),
        }
        write_json(folder / RUN_FILE, sealed({**content, **figures}))


def read_recording(folder: str | Path) -> Recording:
    """Read the recording of a run.

    Args:
        folder: Folder of `write_recording`.

    Raises:
        UserError: The folder is no recording, or a file is damaged.
    """
    if not (Path(folder) / RUN_FILE).is_file():
        raise UserError(f"{folder}: is no recording of a run ({RUN_FILE} is missing); give a folder of run --trace")
    path = file_in(folder, RUN_FILE)
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {shown(version)}, not {FORMAT_VERSION}; record the run again")
    try:
        check_present(FIELDS, content)
        named = {role: content["options"].get(role) for role in ROLES}
        check_fields(dict.fromkeys(ROLES, optional(TEXT)), named, "options: ")
        options: StrategyOptions = build(StrategyOptions, content["options"], "options")
    except UserError as error:
        raise UserError(f"{path}: {error}; record the run again") from error
    check_seal(content, path, "restore the file, or record the run again")
    if options.online_state is not None:
        start = file_in(folder, ONLINE_START_FILE)
        if not start.is_file():
            raise UserError(
                f"{start}: is missing, and the run began with it; restore the file, or record the run again"
            )
        options = replace(options, online_state=start)
    traces = TraceSet(str(folder))
    if traces.manifest.fingerprint != content["traces"]:
        raise UserError(f"{path}: belongs to other traces than {traces.folder}; record the run again")
    rows = [read_telemetry(Path(folder), name, content["telemetry"][name]) for name in ROWS]
    return Recording(traces, options, content["fingerprints"], *rows)


def _options_json(run: "OffloadedRun") -> dict[str, Any]:
    """Return the options of a run as plain values, with the budget in slots."""
    options, settings = run.strategy.options, run.strategy.settings
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    values["budget"] = settings.slots
    values["online_state"] = ONLINE_START_FILE if options.online and run.strategy.online_start is not None else None
    for name in ROLES:
        values[name] = _name(values[name]) if isinstance(values[name], str | Path) else None
    return values


def _name(predictor: str | Path) -> str:
    """Return a pretrained name or a name on the Hub as it is, and the folder's name of a path."""
    name = str(predictor)
    return name if is_hub_name(name) or name in list_pretrained() else Path(name).resolve().name
