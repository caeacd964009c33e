"""``moe-beyond push``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser
from moe_beyond.hub.push import Upload, check_trained_on, prepare_upload, push_upload
from moe_beyond.pretrained import CARD_FILE, find_predictor


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "push",
        "Publish a predictor folder or a trace set on the Hugging Face Hub, with its figures on its card; others then "
        "name it hf:ORG/REPO.",
        "moe-beyond push runs/predictor/version_0/predictor ORG/REPO --private",
    )
    known.add_argument("folder", metavar="FOLDER", help="a predictor folder, a published name, or a trace set")
    known.add_argument("repository", metavar="ORG/REPO", help="the repository; made if it is not there")
    known.add_argument("--private", action="store_true", help="make the repository a private one")
    known.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it is not there")
    known.add_argument("--dry-run", action="store_true", help="show what would be published; ask nobody")
    known.add_argument(
        "--traces", metavar="hf:ORG/REPO", help="published trace set that the predictor was fitted on, for its card"
    )
    return known


def run(words: list[str]) -> None:
    """Publish."""
    args = options().parse_args(words[1:])
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
    published = push_upload(upload, private=args.private, revision=args.revision)
    output.show(published.url, f"commit {published.commit}: {', '.join(upload.files)}")
    output.result(content | {"url": published.url, "commit": published.commit})


def _lines(upload: Upload) -> list[str]:
    card = upload.files[CARD_FILE]
    assert isinstance(card, bytes)
    return [
        f"{upload.repository}, a {upload.kind} repository, would get",
        *(f"{size:>14,} bytes  {name}" for name, size in upload.sizes().items()),
        f"\n{CARD_FILE}:\n\n{card.decode().rstrip()}",
    ]
