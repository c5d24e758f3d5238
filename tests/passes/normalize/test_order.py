"""The normalisation passes as one tuple, and the table of them in the documentation."""

from pathlib import Path

from attnres_fx.passes.normalize.normalization import NORMALIZATION

PAGE = Path(__file__).parents[3] / "docs" / "passes.md"


def test_the_documented_table_begins_with_the_passes_of_the_tuple():
    cells = [line.split("|")[1].strip(" `") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert cells[: len(NORMALIZATION)] == [each.__name__ for each in NORMALIZATION]
    assert not any(
        cell.endswith("_pass") for cell in cells[len(NORMALIZATION) : cells.index("insert_depth_attention_pass")]
    )
