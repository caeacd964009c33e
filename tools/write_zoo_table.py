"""Write the table of all pretrained predictors into checkpoints/README.md: models, predictors, trace sets, versions.

    python tools/write_zoo_table.py [--checkpoints DIR]

The table is between two marks. Its figures are those that `moe-beyond evaluate --record` stored in the folders.
"""

import argparse
from pathlib import Path

from moe_beyond.errors import UserError
from moe_beyond.files import read_text, replacing
from moe_beyond.pretrained import CARD_FILE, LARGE, folder_figures
from moe_beyond.report.tables.pretrained import pretrained_markdown

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
BEGIN, END = "<!-- zoo: python tools/write_zoo_table.py -->\n", "<!-- end of zoo -->\n"
"""Lines around the table."""


def with_table(text: str, folder: Path) -> str:
    """Return the text of a page with the table of a folder's predictors between the marks.

    Args:
        text: Text of the page.
        folder: Folder of predictor folders, whose names have a point.

    Raises:
        UserError: The page lacks a mark, or the configuration of a predictor is damaged.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{folder / CARD_FILE}: has no table; add the lines {BEGIN.strip()} and {END.strip()}")
    predictors = [folder_figures(path.parent) for path in sorted(folder.glob("*.*/config.json"))]
    table = pretrained_markdown(predictors, dict.fromkeys(LARGE, " (clone)"))
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Parse the options and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints", type=Path, default=CHECKPOINTS, help="folder of predictor folders and their README.md"
    )
    args = parser.parse_args()
    page = args.checkpoints / CARD_FILE
    try:
        text = with_table(read_text(page), args.checkpoints)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
