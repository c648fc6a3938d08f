"""``ietagc push``."""

import sys
from argparse import ArgumentParser, Namespace

from ..console import say
from ..run_folder import RunFolder

DESCRIPTION = """
Upload a finished training run to the Hub: the pipeline or the adapter, its card, the settings without the places of
this machine, and the rounds. Nothing else of the folder is uploaded: no training pictures, no list of rows, no skip
counts, no logs, no checkpoints. On a card that is on the Hub already only the run's own section changes.
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("run", metavar="DIR", help="output folder of the run")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hub, such as me/my-model; made if not there")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of it, made if it is not there; default: main")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--message", default="Upload of the trained model", help="of the commit")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one that `hf auth login` stored")


def run(args: Namespace) -> int:
    from ..hub import Repository, UploadError, contents, upload, write_card_of_records

    folder, repository = RunFolder(args.run), Repository(args.repo, args.revision, args.private or None, args.token)
    contents(folder)  # what is missing is told before the Hub is asked
    try:
        repository = repository.create()
        write_card_of_records(folder, repository.name, args.token)
        say(f"Uploaded: {upload(folder, repository, args.message)}")
    except (UploadError, OSError) as error:  # of the network, or of a disk
        print(f"{args.prog} push: {args.repo}: {error}. Nothing is lost: the same command tries again", file=sys.stderr)
        return 1
    return 0
