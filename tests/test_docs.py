"""The code in the documentation runs."""

import re

import numpy as np

from reproduction.tables import ROOT


def test_the_examples_of_attributions_run_in_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "attributions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "attributions.md", "exec"), names)
    assert len(blocks) == 5
    maps = names["maps"]
    assert names["gradients"].dims == ("token", "time", "mel") and names["gradients"].shape == maps.input_saliency.shape
    assert names["focused"].sizes["step"] == names["transported"].sizes["step"] == maps.sizes["step"]
    assert names["contrast"].shape == maps.features.shape and np.ptp(names["contrast"].values) > 0
    assert maps.token.values[names["token"]] == "▁poverty"  # where the other text has "agriculture"
    assert names["previous"].attrs["audio"] > 0.5 and names["previous"].attrs["text"] > 0.1
