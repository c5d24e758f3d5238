"""`attnres-fx profile`: how a model uses its depth."""

import argparse
from typing import Any

from attnres_fx.cli_inputs import load, named_object
from attnres_fx.cli_options import new_file


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Give the command its options; those that name a model it has already."""
    parser.add_argument("--loss", metavar="MODULE:FUNCTION", help="from what the model returns to a scalar")
    parser.add_argument("--train", action="store_true", help="profile the model in train mode instead of eval mode")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="draw it (needs matplotlib)")
    parser.add_argument("--html", type=new_file, metavar="FILE", help="write it as a page")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write it as data")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> int:
    import attnres_fx as ax

    loss = _function(options.loss)
    model, args, kwargs = load(options.model, options.input)
    model.train(options.train)
    profile = ax.profile_depth(model, args, kwargs, loss=loss)
    print(profile)
    if options.reads:
        print(f"\n{profile.reads_table()}")
    if options.plot is not None:
        profile.plot(options.plot)
        print(f"\ndrawn to {options.plot}")
    written = {options.html: f'<!doctype html><meta charset="utf-8">{profile._repr_html_()}\n'}
    written[options.json] = profile.to_json()
    for path, text in written.items():
        if path is not None:
            path.write_text(text)
            print(f"\nwritten to {path}")
    return 0


def _function(place: str | None) -> Any:
    if place is None:
        return None
    if ":" not in place:
        raise ValueError(f"--loss {place!r} should name a function after a colon: mypackage.losses:next_token.")
    return named_object(place, "--loss")
