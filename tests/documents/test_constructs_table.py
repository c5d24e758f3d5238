"""The constructs that the docs list are those that are tested."""

from pathlib import Path

from tests.support.constructs import CONSTRUCTS


def listed(text: str, heading: str) -> set[str]:
    part = text.split(heading)[1].split("\n\n")[0]
    return {" ".join(name.split()) for name in part.strip().rstrip(".").split(",")}


def test_every_construct_is_listed_as_it_is_tested():
    text = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text().split("### Constructs")[1]
    words = {c.name.replace("_", " "): bool(c.refused) for c in CONSTRUCTS}
    assert listed(text, "Kept:\n") == {n for n, refused in words.items() if not refused}
    assert listed(text, "Refused, by a name that says what it is:\n") == {n for n, refused in words.items() if refused}
    assert len(words) >= 70
