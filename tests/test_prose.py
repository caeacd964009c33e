"""Texts that people read are plain English: no banned pattern beyond `data/prose_allowed.json`, which may only shrink.

`python tests/test_prose.py FILE...` prints the matches of files; without files it lowers the list of allowed counts.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = ROOT / "tests/data/prose_allowed.json"
LONGEST = {".md": 30, ".py": 40}
"""Words that a sentence may have, by kind of file."""
UNIT = r"(?:token|layer|step|event|sequence|prompt|epoch|row|expert|second|line|policy|head|matrix|rank|run)"
PATTERNS = {
    "told, tells: name the verb": r"\b(?:told|tells)\b",
    "asked, asks: requested, given": r"\b(?:asked|asks|asking)\b",
    "says, speaks: files and models do not speak": r"\b(?:says|speaks|said)\b",
    "anew: again": r"\banew\b",
    "beside: next to": r"\bbeside\b",
    "alone: only": r"\balone\b",
    "by itself: automatically": r"\bby (?:itself|themselves)\b",
    "lies, stands: is": r"\b(?:lies|stands)\b",
    "worth: value, benefit": r"\bworth\b",
    "shield: pin": r"\bshield\w*",
    "the rest: name it": r"\bthe\s+rest\b",
    "the one that: name the noun": r"\b(?:the|an|no)\s+ones?\s+(?:that|which|of|with|who|before|after)\b",
    "of which there are": r"\bof\s+which\s+there\b",
    "shall": r"\bshall\b",
    "some N: about N": r"\bsome\s+\d",
    "what ... is what": r"\bwhat\b[^.]*\bis\s+what\b",
    "what is X: use a noun": r"\b(?:of|than|by|with|from)\s+what\b|\bwhat\s+(?:was|were|it|they|each|has)\b",
    "where for if": r"\bwhere\s+(?:there|nobody|somebody|none|nothing|it\s+is|they\s+are)\b",
    "a row a token: one row per token": rf"\b(?:a|an|one)\s+\w+\s+an?\s+{UNIT}\b",
    "entries a second: per second": rf"\b(?:entries|accesses|bytes|seconds|minutes|ms|times|nats)\s+an?\s+{UNIT}\b",
    "sentence begins with Of": r"(?:\A\s*|[.:;]\s+)Of\s",
    "participle first: subject first": r"(?:\A\s*|[.;]\s+)(?:Counted|Told|Drawn|Given|Left)\s+(?:is|are|at|out)\b",
}
BARE_ENTRY = re.compile(r"(?:Of|What|It|Its|Where|How|Which|To|These|Those|They|That|Whose)\b", re.IGNORECASE)
SHOWN = {"help", "description", "epilog", "metavar", "title", "caption"}


def without_code(text: str) -> str:
    """Blank out code in backticks, keeping lines."""
    return re.sub(r"``.*?``|`[^`]*`", lambda match: re.sub(r"[^\s`]", "x", match[0]), text, flags=re.DOTALL)


def python_texts(source: str, strings: bool) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, text) of docstrings and comments, and of `strings` with three words or more."""
    previous = -1
    block: tuple[int, list[str]] = (0, [])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(?:type:|noqa|fmt:|ruff|!|pragma)", token.string):
            if token.start[0] != previous + 1:
                yield block[0], "comment", "\n".join(block[1])
                block = (token.start[0], [])
            block[1].append(token.string.lstrip("# "))
            previous = token.start[0]
    yield block[0], "comment", "\n".join(block[1])
    tree = ast.parse(source)
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.add(id(node.value))
            yield node.lineno, "docstring", node.value.value
        if strings and isinstance(node, ast.keyword) and node.arg in SHOWN and isinstance(node.value, ast.Constant):
            yield node.value.lineno, "help", str(node.value.value)
    for node in ast.walk(tree) if strings else ():
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            documented.update(id(part) for part in node.values)
            yield node.lineno, "string", "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            if len(node.value.split()) > 2:
                yield node.lineno, "string", node.value


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, sentence) of paragraphs, list items and entries of a docstring; tables and headings have none."""
    items: list[tuple[int, list[str]]] = []
    paragraph = False
    for number, line in enumerate(text.splitlines()):
        if not line.strip() or re.match(r"\s*(?:\||#|>>>|<|!\[)", line):
            paragraph = False
            continue
        if not paragraph or re.match(r"\s*(?:[-*] |\d+\. |\*{0,2}\w+(?: \([^)]*\))?:(?: |$))", line):
            items.append((number, []))
        paragraph = True
        items[-1][1].append(line)
    for number, lines in items:
        for sentence in re.split(r"(?:(?<=[.!?:])|(?<=[.:]\*\*))\s+(?=[A-Z`*\[(-])", "\n".join(lines)):
            yield number, sentence
            number += sentence.count("\n")


def matches(path: Path) -> list[tuple[int, str, str]]:
    """Return (line, pattern, text) of a file's banned patterns, in order of lines."""
    source = path.read_text()
    if path.suffix == ".md":
        prose = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), source, flags=re.DOTALL | re.M)
        texts = [(1, "markdown", re.sub(r"\]\([^)]*\)", "]", prose))]
    else:
        texts = list(python_texts(source, strings="tests" not in path.parts))
    found = []
    for first, kind, raw in texts:
        text = without_code(raw)
        for name, pattern in PATTERNS.items():
            for match in re.finditer(pattern, text):
                line = first + text[: match.end()].count("\n")
                found.append((line, name, " ".join(raw[max(0, match.start() - 40) : match.end() + 40].split())))
        if kind in ("markdown", "docstring"):
            for at, sentence in sentences(text):
                words = re.sub(r"`[^`]*`", "`x`", sentence).split()
                if len(words) > LONGEST[path.suffix]:
                    found.append((first + at, f"sentence of {len(words)} words", " ".join(words[:12]) + " ..."))
        if kind == "docstring":
            for section in re.finditer(r"^( *)(?:Args|Attributes):\n((?:\1 .*\n|\n)+)", text + "\n", re.M):
                for entry in re.finditer(r"^( +)\*{0,2}\w+(?: \([^)]*\))?: (.*(?:\n\1 +.*)*)", section[2], re.M):
                    line = first + text[: section.start(2) + entry.start()].count("\n")
                    if BARE_ENTRY.match(entry[2]) or len(entry[2].split()) <= 2:
                        found.append((line, "entry without a noun phrase", " ".join(entry[0].split())[:80]))
        if kind == "help" and BARE_ENTRY.match(raw):
            found.append((first, "entry without a noun phrase", raw))
    return sorted(set(found))


def files() -> dict[str, Path]:
    """Return the files that are checked, by their path in the repository."""
    patterns = ("*.md", "moe_beyond/**/*.md", "*/README.md", "checkpoints/*/README.md", "tools/**/*.md")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    paths += [path for folder in ("moe_beyond", "tools", "tests") for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path for path in sorted(set(paths)) if path != Path(__file__).resolve()}


ALLOWED_COUNTS: dict[str, int] = json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}


@pytest.mark.parametrize("name", sorted(files().keys() | ALLOWED_COUNTS))
def test_texts_are_plain_english(name: str) -> None:
    path = files().get(name)
    found = matches(path) if path else []
    allowed = ALLOWED_COUNTS.get(name, 0)
    listing = "\n".join(f"{name}:{line}: {pattern}: {text}" for line, pattern, text in found)
    assert len(found) <= allowed, f"{len(found)} matches, {allowed} allowed\n{listing}"
    assert len(found) == allowed, f"only {len(found)} of {allowed} matches left: run python tests/test_prose.py"


def main(arguments: list[str]) -> None:
    """Print the matches of files; without files, write the counts that are allowed."""
    for argument in arguments:
        for line, pattern, text in matches(Path(argument)):
            print(f"{argument}:{line}: {pattern}: {text}")
    if not arguments:
        counts = {name: count for name, path in files().items() if (count := len(matches(path)))}
        ALLOWED.write_text(json.dumps(counts, indent=1) + "\n")
        print(f"{sum(counts.values())} matches in {len(counts)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
