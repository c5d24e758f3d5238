"""A graph with nothing to normalise is left as it is."""

import pytest

from attnres_fx.passes import (
    functionalize_mutations_pass,
    inline_regions_pass,
    rejoin_rows_pass,
    split_new_rows_pass,
    undo_reshapes_pass,
    unfold_row_writes_pass,
    unfuse_additions_pass,
)
from tests.support.pass_checks import (
    check_idle,
    plain,
)
from tests.support.stream_text import captured, rows, toy

IDLE = pytest.mark.parametrize(
    "run",
    [
        inline_regions_pass,
        functionalize_mutations_pass,
        unfuse_additions_pass,
        rejoin_rows_pass,
        split_new_rows_pass,
        unfold_row_writes_pass,
        undo_reshapes_pass,
    ],
    ids=lambda run: run.__name__,
)


@IDLE
@pytest.mark.parametrize("spelling", ["symbolic", "export", "dynamo"])
def test_a_plain_residual_layer_needs_no_normalisation(run, spelling):
    check_idle(run, captured(toy(plain), (rows(),), spelling))
