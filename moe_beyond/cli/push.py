"""``moe-beyond push``."""

from moe_beyond.cli.options import parser
from moe_beyond.hub.push import Upload, check_trained_on, prepare, push
from moe_beyond.published import CARD_FILE, find_predictor


def run(words: list[str]) -> None:
    """Parse the options, publish."""
    options = parser(
        "push",
        "Publish a predictor folder or a trace set on the Hugging Face Hub, with its figures on its card; others then "
        "name it hf:ORG/REPO.",
        "moe-beyond push runs/predictor/version_0/predictor ORG/REPO --private",
    )
    options.add_argument("folder", metavar="FOLDER", help="a predictor folder, a published name, or a trace set")
    options.add_argument("repository", metavar="ORG/REPO", help="the repository; made if it is not there")
    options.add_argument("--private", action="store_true", help="make the repository a private one")
    options.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it is not there")
    options.add_argument("--dry-run", action="store_true", help="show what would be published; ask nobody")
    options.add_argument(
        "--traces", metavar="hf:ORG/REPO", help="published trace set that the predictor was fitted on, for its card"
    )
    args = options.parse_args(words[1:])
    folder = find_predictor(args.folder)
    upload = prepare(folder, args.repository, args.traces)
    if args.dry_run:
        _show(upload)
        return
    if args.traces is not None:
        check_trained_on(folder, args.traces)
    published = push(upload, private=args.private, revision=args.revision)
    print(f"{published.url}\ncommit {published.commit}: {', '.join(upload.files)}")


def _show(upload: Upload) -> None:
    print(f"{upload.repository}, a {upload.kind} repository, would get")
    for name, size in upload.sizes().items():
        print(f"{size:>14,} bytes  {name}")
    card = upload.files[CARD_FILE]
    assert isinstance(card, bytes)
    print(f"\n{CARD_FILE}:\n\n{card.decode()}", end="")
