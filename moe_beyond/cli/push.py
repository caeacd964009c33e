"""``moe-beyond push``."""

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser
from moe_beyond.pretrained import CARD_FILE, find_predictor

if TYPE_CHECKING:
    from moe_beyond.hub.push import Upload


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "push",
        "Upload a predictor folder or a trace set to the Hugging Face Hub, with its figures on its card. "
        "Other commands accept it as hf:ORG/REPO.",
        "moe-beyond push runs/predictor/version_0/predictor ORG/REPO --private",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="predictor folder, name of a pretrained predictor, or trace set"
    )
    parser.add_argument("repository", metavar="ORG/REPO", help="repository, created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository (default: public)")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to, created if it does not exist (default: main)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the files of the upload; make no network request")
    parser.add_argument(
        "--traces",
        metavar="hf:ORG/REPO",
        help="uploaded trace set that the predictor was fitted on, for its card (default: none)",
    )
    return parser


def main(argv: list[str]) -> None:
    """Upload a folder.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    from moe_beyond.hub.push import check_trained_on, prepare_upload, push_upload

    output = Output(args)
    folder = find_predictor(args.folder)
    upload = prepare_upload(folder, args.repository, args.traces)
    content = {"repository": upload.repository, "kind": upload.kind, "files": upload.sizes()}
    if args.dry_run:
        output.show(*_lines(upload))
        output.result(content | {"url": None, "commit": None})
        return
    if args.traces is not None:
        check_trained_on(folder, args.traces)
    result = push_upload(upload, private=args.private, revision=args.revision)
    output.show(result.url, f"commit {result.commit}: {', '.join(upload.files)}")
    output.result(content | {"url": result.url, "commit": result.commit})


def _lines(upload: "Upload") -> list[str]:
    card = upload.files[CARD_FILE]
    assert isinstance(card, bytes)
    return [
        f"{upload.repository}, a {upload.kind} repository, would get",
        *(f"{size:>14,} bytes  {name}" for name, size in upload.sizes().items()),
        f"\n{CARD_FILE}:\n\n{card.decode().rstrip()}",
    ]
