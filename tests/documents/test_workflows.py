"""What docs/workflows.md says of its scripts: three new lines at most, and what each leaves behind."""

import re

import pytest
import torch

import attnres_fx as ax
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "workflows.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def scripts(section):
    return re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.split()[-1])
@pytest.mark.slow
def test_three_lines_are_new_and_the_saved_model_computes_what_the_script_s_does(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converted, compiled = scripts(SECTIONS[section])
    names: dict = {}
    for script in (converted, compiled):
        assert 0 < script.count("# new\n") <= 3
        assert not any("ax." in line for line in script.splitlines() if not line.endswith("# new"))
    exec(compile(converted, section, "exec"), names)
    model = names["model"]
    (file,) = tmp_path.glob("*.attnres")
    with torch.no_grad():
        args = (
            (names["image"], names["timestep"])
            if "image" in names
            else (names["idx"][:, :16],)
            if "idx" in names
            else ()
        )
        kwargs = {} if args else names["batch"]
        found, wanted = (m.eval()(*args, **kwargs) for m in (ax.load(file), model))
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert any(read.query.abs().max() > 0 for read in model.attnres.reads)  # trained
    # AOTAutograd costs ten times what the rest of a script does: one section shows that the page's compiler does it.
    quick = compiled if section == "A hand-written GPT" else compiled.replace('inner="aot_eager"', 'inner="eager"')
    exec(compile(quick, section, "exec"), names)
    (adapter,) = tmp_path.glob("*-adapter")
    assert sorted(f.name for f in adapter.iterdir()) == ["attnres.safetensors", "attnres_config.json"]
