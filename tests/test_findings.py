"""The rule that judges findings, and the statistics that it judges."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from reproduction.findings import changed, judge, verdict


@pytest.mark.parametrize(
    ("interval", "expected", "judgement"),
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
def test_a_verdict_compares_the_interval_with_the_expected_range(interval, expected, judgement):
    assert verdict(*interval, expected) == judgement


def sample(shift: float, seed: int = 0, audio: str = "en") -> xr.Dataset:
    """rho of six utterances, four layers and two heads.

    Single heads have 0.2, averages over heads rise from 0.4 to 0.55 with the layer, and SM^H has 0.1 more than SM^X.
    """
    rng = np.random.default_rng(seed)
    values = np.full((3, 6, 5, 3), 0.2)
    values[..., 2] = [0.40, 0.45, 0.50, 0.55, 0.55]
    values[1] += 0.1
    values += shift + rng.normal(0, 0.005, (1, 6, 1, 1))
    values[2] = values[1] - values[0]
    axes = ("saliency", "utterance")
    variables = {
        "by_layer_and_head": ((*axes, "layer", "head"), values[:, :, :4, :2]),
        "by_layer": ((*axes, "layer"), values[:, :, :4, 2]),
        "by_head": ((*axes, "head"), values[:, :, 4, :2]),
        "overall": (axes, values[:, :, 4, 2]),
        "reliability": (axes, np.repeat([[0.81], [1.0], [np.nan]], 6, axis=1)),
    }
    coordinates = {
        "saliency": ["input", "encoder", "difference"],
        "utterance": [f"{audio}{i}" for i in range(6)],
        "layer": [1, 2, 3, 4],
        "head": [1, 2],
    }
    return xr.Dataset(variables, coords=coordinates)


def tables(best: str = "2d_max") -> dict[str, pd.DataFrame]:
    common = {"model": "base", "setting": "en", "n": 6}
    sign = 1 if best == "2d_max" else -1
    tab1 = pd.DataFrame(
        [
            {"reduction": "2d_max", "minus": None, "quantity": "rho", "value": 0.4, "low": 0.3, "high": 0.5, **common},
            {"reduction": "2d_max", "minus": "2d_avg", "quantity": "deletion", "value": 9.0 * sign, **common}
            | dict(zip(("low", "high"), sorted((5.0 * sign, 12.0 * sign)), strict=True)),
        ]
    )
    tab6 = pd.DataFrame(
        {"map": a, "minus": b, "metric": metric, "area": v, "low": v - 5, "high": v + 5, **common}
        for a, b, v in (
            ("CA", None, 40.0),
            ("SM^X 2d_max", "CA", 20.0),
            ("SM^X", "SM^X 2d_max", 2.0),
            ("SM^X", "energy", -9.0),
        )
        for metric in ("corpus-capped WER", "utterance-capped WER")
    )
    return {"tab1": tab1, "tab6": tab6}


def test_planted_findings_are_found():
    found = judge({"base/en": sample(0.0), "base/it": sample(-0.1, seed=1, audio="it")}, tables())
    verdicts = found.set_index(["finding", "where"]).verdict
    for finding in ("averages beat single heads", "averaging over heads helps", "the last layers are best"):
        assert verdicts[finding, "base/en"] == "holds"
    values = found[found["where"] == "base/en"].set_index("finding").value
    assert values["averages beat single heads"] == pytest.approx(0.35)
    assert values["averaging over heads helps"] == pytest.approx(0.275)
    assert values["averaging over layers helps"] == pytest.approx(0.075)
    assert values["the last layers are best"] == pytest.approx(0.05)
    assert verdicts["about half of the input's relevance", "base/en"] == "holds"
    corrected = found.set_index(["finding", "where"]).loc["about half of the input's relevance, corrected for noise"]
    assert corrected.value["base/en"] == pytest.approx(0.55 / 0.9, abs=0.01) and corrected.verdict["base/en"] == "holds"
    assert verdicts["encoder saliency correlates more", "base/en"] == "holds"
    assert verdicts["context mixing is 0.03 to 0.18", "base/en"] == "holds"
    assert verdicts["English recognition above other settings", "base, en and it"] == "holds"
    assert verdicts["2D max is the best reduction", "base/en"] == "holds"
    assert verdicts["SM^X reduced beats CA", "base/en"] == "holds"
    assert verdicts["full resolution beats reduced", "base/en"] == "undecided"
    value = found.set_index(["finding", "where"]).value
    noiseless = value["encoder saliency correlates more, corrected for noise", "base/en"]
    assert noiseless == pytest.approx(0.65 - 0.55 / 0.9, abs=0.01)
    noiseless = value["English recognition above other settings, corrected for noise", "base, en and it"]
    assert noiseless == pytest.approx(0.1 / 0.9, abs=0.01)
    assert set(found[found.finding == "full resolution beats reduced"].value) == {2.0}  # no other row of tab6
    assert found.set_index("finding").loc["context mixing is 0.03 to 0.18", "value"].iloc[0] == pytest.approx(0.1)
    assert judge({"base/en": sample(0.0)}, tables("2d_avg")).set_index("finding").verdict[
        "2D max is the best reduction"
    ] == ("does not hold")


def test_models_are_compared_in_the_same_direction():
    found = judge({"small/en": sample(0.0), "large/en": sample(0.2)}, tables()).set_index("finding")
    assert found.verdict["scale matters little"] == "does not hold"
    assert found.value["scale matters little"] == pytest.approx(0.2)
    three = judge({"base/en": sample(0.01), "small/en": sample(0.0), "large/en": sample(0.05)}, tables())
    scale = three[three.finding == "scale matters little"].set_index("where").value
    expected = {"base and small, en": -0.01, "base and large, en": 0.04, "small and large, en": 0.05}
    assert scale.to_dict() == pytest.approx(expected)
    released = judge({"fama-small/it": sample(0.0), "fama-medium/it": sample(0.02)}, tables())
    assert "fama-small and fama-medium, it" in set(released["where"])


def test_directions_of_the_same_audio_are_compared_in_pairs():
    pairs = {"base/en": sample(0.0), "base/en-it": sample(-0.001)}
    narrow = judge(pairs, tables()).set_index("finding").loc["English recognition above other settings"]
    assert narrow.verdict == "holds" and narrow.high - narrow.low < 1e-6
    pairs["base/en-it"] = pairs["base/en-it"].assign_coords(utterance=[f"it{i}" for i in range(6)])
    wide = judge(pairs, tables()).set_index("finding").loc["English recognition above other settings"]
    assert wide.verdict == "undecided" and wide.value == pytest.approx(narrow.value)


def test_recordings_of_two_languages_are_not_paired_though_both_are_numbered_from_0():
    numbered = {"utterance": [str(i) for i in range(6)]}
    samples = {
        f"base/{direction}": sample(shift).assign_coords(numbered)
        for direction, shift in {"en": 0.0, "en-it": -0.001, "it": -0.001}.items()
    }
    found = judge(samples, tables()).set_index(["finding", "where"]).loc["English recognition above other settings"]
    assert found.verdict.to_dict() == {"base, en and en-it": "holds", "base, en and it": "undecided"}


def test_findings_whose_data_are_missing_are_not_available():
    alone = sample(0.0).sel(saliency=["input"])
    alone["reliability"] = alone.reliability * np.nan
    found = judge({"base/en": alone}, {}).set_index(["finding", "where"])
    whole = judge({"base/en": sample(0.0)}, tables()).set_index(["finding", "where"])
    missing = found[found.verdict == "not available"]
    assert set(missing.index.unique("finding")) == {
        "about half of the input's relevance, corrected for noise",
        "52 to 75 % of the encoder's saliency",
        "52 to 75 % of the encoder's saliency, corrected for noise",
        "encoder saliency correlates more",
        "encoder saliency correlates more, corrected for noise",
        "context mixing is 0.03 to 0.18",
        "2D max is the best reduction",
        "SM^X reduced beats CA",
        "full resolution beats reduced",
    }
    assert missing[["value", "low", "high"]].isna().all(axis=None)
    rest = found.drop(missing.index)
    assert len(rest) == 5
    pd.testing.assert_frame_equal(rest, whole.loc[rest.index])


def test_the_best_reduction_is_judged_by_the_quantities_in_the_table():
    measured = tables()["tab1"]
    rho = {"quantity": "rho", "minus": "2d_avg", "value": 0.1, "low": 0.05, "high": 0.2}
    both = pd.concat([measured, measured[measured.quantity == "rho"].assign(**rho)])
    columns = ["finding", "where", "statistic", "value", "verdict"]
    found = judge({}, {"tab1": both[both.quantity == "rho"]})[columns]
    found = found[found.finding == "2D max is the best reduction"].drop(columns="finding")
    assert found.iloc[0].drop("value").tolist() == ["", "needs deletion in tab1", "not available"]
    assert found.iloc[1:].values.tolist() == [["base/en", "rho, 2d_max minus 2d_avg", 0.1, "holds"]]
    whole = judge({}, {"tab1": both}).set_index("finding").loc["2D max is the best reduction"]
    assert whole.statistic.tolist() == ["deletion, 2d_max minus 2d_avg", "rho, 2d_max minus 2d_avg"]


def test_findings_with_another_verdict_elsewhere_are_listed():
    here = judge({"base/en": sample(0.0), "base/it": sample(-0.1, seed=1, audio="it")}, tables())
    there = judge({"base/en": sample(0.0)}, tables("2d_avg"))
    different, shared = changed(here, there)
    assert shared == len(there) < len(here)
    (row,) = different.itertuples(index=False)
    assert row[:3] == ("2D max is the best reduction", "base/en", "deletion, 2d_max minus 2d_avg")
    assert row[3:] == (9.0, -9.0, "holds", "does not hold")
    assert changed(here, here)[0].empty
