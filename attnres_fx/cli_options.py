"""Options that several commands have, and the types of what they are given."""

import argparse
from pathlib import Path


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that every conversion has."""
    parser.add_argument(
        "--variant",
        default="block",
        choices=("full", "block", "local"),
        help="what a read sees: every sublayer, sums of blocks, or its own block (default: block)",
    )


def indices(text: str) -> list[int]:
    """The type of an option that lists sublayers."""
    try:
        return [int(t) for t in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be sublayer indices with commas between them: 4,8") from None


def new_file(text: str) -> Path:
    """The type of an option that names a file to write; before the work, not after it, the place is found missing."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    return path
