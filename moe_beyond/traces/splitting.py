"""Writing a recording's sequences to their splits, so that no text of training is in validation too."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_beyond.errors import UserError
from moe_beyond.traces.copies import text_digest, without_copies
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import TraceWriter, open_writer


def write_splits(
    writer: TraceWriter,
    traces: Iterable[Trace],
    held_out: Collection[int],
    *,
    manifest: Manifest,
    folder: Path,
    source: str,
) -> None:
    """Write sequences to ``train``, and those chosen for validation to ``validation``, but for copies of training's.

    Which are copies is known once all sequences were seen. Those chosen wait in a trace set of their own, so that a
    recording of any size passes through.

    Args:
        writer: Writer of the trace set.
        traces: The sequences; they are numbered in this order.
        held_out: Numbers of those chosen for validation.
        manifest: Manifest of the trace set, without shards.
        folder: Folder for the sequences chosen for validation while they wait.
        source: The recording, for error messages.

    Raises:
        UserError: A sequence does not fit the trace set, or all that were chosen are copies.
    """

    def write(target: TraceWriter, trace: Trace, split: str) -> None:
        try:
            target.write(trace, split)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    if not held_out:
        for trace in traces:
            write(writer, trace, "train")
        return
    texts = {}
    with TemporaryDirectory(prefix=".chosen.", dir=folder) as temporary:
        waiting = Path(temporary) / "set"
        tokenizer = replace(manifest.tokenizer, sha256=None)  # its file is not copied here
        with open_writer(waiting, replace(manifest, tokenizer=tokenizer)) as chosen:
            for number, trace in enumerate(traces):
                texts[number] = text_digest(trace.token_ids if manifest.has_token_ids else trace.experts)
                write(chosen if number in held_out else writer, trace, "train")
        kept = without_copies(held_out, texts)
        for number, trace in zip(sorted(held_out), TraceSet(str(waiting)).traces(), strict=True):
            write(writer, trace, "validation" if number in kept else "train")
