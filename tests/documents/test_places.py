"""Files and modules that README, docs and CONTRIBUTING name are there."""

import importlib
import re

import pytest

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    paths = re.findall(r"\b(?:attnres_fx|tests|benchmarks|examples|docs|studies)/[\w/]+(?:\.\w+)?", text)
    written_later = {"attnres_fx/ops/kernels/launches.json"}  # by benchmarks/tune.py, on a device
    missing = {p for p in paths if not (ROOT / p).exists()} - written_later
    links = {link for link in re.findall(r"\]\(([^)#:]+)", text) if not (page.parent / link).exists()}
    assert not missing and not links


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_modules_that_a_page_names_import(page):
    for name in re.findall(r"(?<!ops\.)\battnres_fx(?:\.\w+)+", page.read_text()):
        module, found = importlib.import_module("attnres_fx"), ["attnres_fx"]
        for part in name.split(".")[1:]:
            found.append(part)
            if not hasattr(module, part):
                importlib.import_module(".".join(found))
            module = getattr(module, part)
