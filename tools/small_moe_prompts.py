"""Write prompts for small-moe from files that it never saw, with a split for every file.

    python tools/small_moe_prompts.py --out small-moe-python.jsonl [--text LIB] [--tokens N]

The files are those of Python's library, tests included, that the training of small-moe held out: one in twenty, by the
hash of its name. The default library is that of the running Python. The bundled prompts from Python's documentation
follow. Whole files are held out: an eighth of the text for testing, and an eighth of the other text for validation. The
files that the quickstart holds out are test files, too.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train_small_moe import CONTEXT, is_held_out
from transformers import AutoTokenizer

from moe_beyond.files import replacing
from moe_beyond.pretrained import shipped_folder
from moe_beyond.quickstart import MODEL, bundled_prompts
from moe_beyond.traces.splits import held_out_numbers

ONE_IN = 8
"""Share of the text that a held-out split has, as one in EVERY."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of a library with files of other projects."""
SHORTEST = 8
"""Tokens of the shortest prompt."""


def read_files(library: Path) -> dict[str, str]:
    """Return the held-out files of a library: name as in the training of small-moe -> text.

    Raises:
        SystemExit: There is none.
    """
    paths = {f"Lib/{path.relative_to(library)}": path for path in sorted(library.rglob("*.py"))}
    names = [name for name in paths if is_held_out(name) and not INSTALLED & set(Path(name).parts)]
    if not names:
        raise SystemExit(f"{library}: contains no library file that small-moe never saw; give --text")
    return {name: paths[name].read_text(encoding="utf-8", errors="replace") for name in names}


def prompts(library: Path, most: int) -> Iterator[dict[str, str]]:
    """Yield prompts with ``id``, ``split`` and ``text``.

    Args:
        library: Folder of Python's library.
        most: Largest number of tokens per file.
    """
    tokenizer = AutoTokenizer.from_pretrained(shipped_folder(MODEL))
    bundled, files = bundled_prompts(), read_files(library)
    excerpts = {name: list(_excerpts(tokenizer, text, most)) for name, text in files.items()}
    for prompt in bundled:
        if prompt.source not in files and prompt.source.startswith("Doc/"):
            excerpts.setdefault(prompt.source, []).append(str(prompt.text))
    tests = {prompt.source for prompt in bundled if prompt.split == "validation"}
    splits = dict.fromkeys(tests, "test")
    names = list(excerpts)
    for split in ("test", "validation"):
        sizes = {number: len(excerpts[name]) for number, name in enumerate(names) if name not in splits}
        splits |= {names[number]: split for number in held_out_numbers(sizes, 1, ONE_IN)}
    for name, texts in excerpts.items():
        for place, text in enumerate(texts):
            yield {"id": f"{name}:{place}", "split": splits.get(name, "train"), "text": text}


def _excerpts(tokenizer: AutoTokenizer, text: str, most: int) -> Iterator[str]:
    """Yield the text in parts of one training row of small-moe each."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[:most]  # type: ignore[operator]
    for begin in range(0, len(ids), CONTEXT - 1):
        part = ids[begin : begin + CONTEXT - 1]
        if len(part) >= SHORTEST:
            yield tokenizer.decode(part)


def main() -> None:
    """Parse the options and write the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON Lines file to write")
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python's library (default: that of this Python)",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="largest number of tokens per file (default: 16384)")
    args = parser.parse_args()
    rows = list(prompts(args.text, args.tokens))
    with replacing(args.out) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for split in ("train", "validation", "test"):
        chosen = [row["id"].rpartition(":")[0] for row in rows if row["split"] == split]
        print(f"{args.out}: {split}: {len(chosen):,} prompts from {len(set(chosen)):,} files")


if __name__ == "__main__":
    main()
