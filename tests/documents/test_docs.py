"""Every Python block in README and docs runs."""

import gc
import re

import pytest
import torch

from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("quick_collections")
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in p.read_text()]
PAGES.remove(ROOT / "docs" / "workflows.md")  # test_workflows.py runs it


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.slow
def test_the_code_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gc.collect()  # a reader begins in a fresh process
    torch.compiler.reset()
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    assert blocks
    names: dict = {"__name__": "page"}  # functions that a graph calls must be in some module
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
