"""The site has every page of docs/, and its API page every public name."""

import re
import runpy

import attnres_fx
from tests.support.paths import ROOT


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^\s+- .*?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))


def test_every_public_function_and_class_is_on_the_api_page():
    shown = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    }
    elsewhere = {"__version__", "ops", "AttnResError"}  # the operator and the errors have entries of their own
    assert set(attnres_fx.__all__) - elsewhere <= shown


def test_the_picture_is_what_its_command_draws():
    drawn = runpy.run_path(str(ROOT / "examples" / "draw_reads.py"))["drawing"]()
    assert (ROOT / "docs" / "reads.svg").read_text() == drawn
