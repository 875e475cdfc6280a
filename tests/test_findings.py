"""The rule that judges findings, and the statistics it is given."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from xattn.findings import correlations, judge, verdict


@pytest.mark.parametrize(
    ("interval", "expected", "said"),
    [
        ((0.1, 0.2), (0.0, np.inf), "holds"),
        ((-0.1, 0.2), (0.0, np.inf), "undecided"),
        ((-0.2, -0.1), (0.0, np.inf), "does not hold"),
        ((0.5, 0.6), (0.45, 0.64), "holds"),
        ((0.4, 0.5), (0.45, 0.64), "undecided"),
        ((0.7, 0.8), (0.45, 0.64), "does not hold"),
        ((np.nan, np.nan), (0.0, np.inf), "undecided"),
    ],
)
def test_verdict(interval, expected, said):
    assert verdict(*interval, expected) == said


def sample(shift: float, seed: int = 0) -> xr.DataArray:
    """Six utterances, four layers, two heads: single heads 0.2, averages 0.5 rising with the layer, SM^H 0.1 above."""
    rng = np.random.default_rng(seed)
    layers, heads = [1, 2, 3, 4, "mean"], [1, 2, "mean"]
    values = np.full((2, 6, 5, 3), 0.2)
    values[..., 2] = [0.40, 0.45, 0.50, 0.55, 0.55]
    values[1] += 0.1
    values += shift + rng.normal(0, 0.005, (1, 6, 1, 1))
    coordinates = {
        "source": ["input", "encoder"],
        "utterance": [f"u{i}" for i in range(6)],
        "layer": np.array(layers, dtype=object),
        "head": np.array(heads, dtype=object),
    }
    return xr.DataArray(values, coords=coordinates, dims=list(coordinates))


def tables(best: str = "2d_max") -> dict[str, pd.DataFrame]:
    common = {"model": "base", "setting": "en", "n": 6}
    values = {"2d_max": 50.0, "2d_avg": 50.0, "1d_max_1d_avg": 45.0} | {best: 70.0}
    tab1 = pd.DataFrame(
        {"reduction": k, "quantity": "deletion", "value": v, "low": v - 5, "high": v + 5, **common}
        for k, v in values.items()
    )
    areas = {"CA": 40.0, "SM^X 2d_max": 60.0, "SM^X": 62.0}
    tab6 = pd.DataFrame(
        {"map": k, "metric": "corpus-capped WER", "area": v, "low": v - 5, "high": v + 5, **common}
        for k, v in areas.items()
    )
    return {"tab1": tab1, "tab6": tab6}


def test_findings_of_planted_results():
    found = judge({"base/en": sample(0.0), "base/it": sample(-0.1, seed=1)}, tables())
    said = found.set_index(["finding", "where"]).verdict
    assert said["averages beat single heads", "base/en"] == "holds"
    assert said["later layers are best", "base/en"] == "holds"
    assert said["about half of the input's relevance", "base/en"] == "holds"
    assert said["encoder saliency correlates more", "base/en"] == "holds"
    assert said["context mixing is 0.03 to 0.18", "base/en"] == "holds"
    assert said["English recognition above other settings", "base, en and it"] == "holds"
    assert said["2D max is the best reduction", "base/en"] == "holds"
    assert said["SM^X reduced beats CA", "base/en"] == "holds"
    assert said["full resolution beats reduced", "base/en"] == "undecided"
    assert found.set_index("finding").loc["context mixing is 0.03 to 0.18", "value"].iloc[0] == pytest.approx(0.1)
    assert judge({"base/en": sample(0.0)}, tables("2d_avg")).set_index("finding").verdict[
        "2D max is the best reduction"
    ] == ("does not hold")


def test_scale_is_compared_within_a_setting():
    found = judge({"small/en": sample(0.0), "large/en": sample(0.2)}, tables()).set_index("finding")
    assert found.verdict["scale matters little"] == "does not hold"
    assert found.value["scale matters little"] == pytest.approx(0.2)


def test_correlations_of_utterances(made):
    rho = correlations([made.maps(), made.maps(seed=1, utterance="made-2")])
    assert rho.dims == ("source", "utterance", "layer", "head")
    assert rho.sizes["utterance"] == 2 and rho.layer.values[-1] == "mean"
