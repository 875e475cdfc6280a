"""The rule that judges findings, and the statistics that it judges."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from reproduction.findings import changed, compare_reported, contradictions, judge, summary, verdict
from xattn.analysis.intervals import chosen_on_others, jackknife_interval, mean_interval

FACTORS = 0.9, np.sqrt(2 - 1.1**2)  # of SM^X and SM^H in `sample`, whose halves have rho / 1.1
BEST_REDUCTION, SCALE = "2D max is the best reduction", "scale matters little"
ENGLISH = "English recognition above other directions"


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
        ((0.0, 0.0), (0.0, np.inf), "undecided"),
        ((-1e-12, 1e-12), (0.0, np.inf), "undecided"),
    ],
)
def test_a_verdict_compares_the_interval_with_the_expected_range(interval, expected, judgement):
    assert verdict(*interval, expected) == judgement


def sample(shift=0.0, seed=0, audio="en", n=10, reliability=(0.8, 0.9), ratio=1.1):
    """rho of n utterances, four layers and two heads, as from `correlate_all`.

    Single heads have 0.2, averages over heads rise from 0.4 to 0.55 with the layer, and SM^H has 0.1 more than SM^X.
    The halves of the masks have rho / ratio.
    """
    rng = np.random.default_rng(seed)
    values = np.full((2, n, 5, 3), 0.2)
    values[..., 2] = [0.40, 0.45, 0.50, 0.55, 0.55]
    values[1] += 0.1
    values += shift + rng.normal(0, 0.005, (1, n, 1, 1))
    values = np.stack([values, values / ratio], axis=1)
    axes = ("saliency", "masks", "utterance")
    variables = {
        "by_layer_and_head": ((*axes, "layer", "head"), values[..., :4, :2]),
        "by_layer": ((*axes, "layer"), values[..., :4, 2]),
        "by_head": ((*axes, "head"), values[..., 4, :2]),
        "overall": (axes, values[..., 4, 2]),
        "reliability": (("saliency", "utterance"), np.repeat(np.array(reliability)[:, None], n, axis=1)),
    }
    coordinates = {
        "saliency": ["input", "encoder"],
        "masks": ["all", "half"],
        "utterance": [f"{audio}{i}" for i in range(n)],
        "layer": [1, 2, 3, 4],
        "head": [1, 2],
    }
    about = {"model": "base", "setting": "en", "estimator": "mean", "linear": ["encoder"], "without_scores": []}
    return xr.Dataset(variables, coords=coordinates, attrs=about)


def overall(rho, saliency="input"):
    return rho.overall.sel(saliency=saliency, masks="all").values


def tables(best="2d_max", n=10, reliability=0.8):
    """The rows of tab1 and tab6 that findings can use, and others that they must not use."""
    common = {"model": "base", "direction": "en", "n": n, "reliability": reliability}
    sign = 1 if best == "2d_max" else -1
    rows = [
        ("2d_max", None, "rho", 0.4, 0.3, 0.5),
        ("2d_max", "2d_avg", "deletion", 9.0 * sign, *sorted((5.0 * sign, 13.0 * sign))),
        ("2d_max", "2d_avg", "insertion", 7.0, 6.0, 8.0),  # 2D max is worse
    ]
    tab1 = pd.DataFrame(rows, columns=["reduction", "minus", "quantity", "value", "low", "high"]).assign(**common)
    tab6 = pd.DataFrame(
        {"map": a, "minus": b, "metric": metric, "area": v, "low": v - 5, "high": v + 5, **common}
        for a, b, v in (
            ("CA", None, 40.0),
            ("SM^X 2d_max", "CA", 20.0),
            ("SM^X", "SM^X 2d_max", 2.0),
            ("SM^X", "energy", -9.0),
        )
        for metric in (
            *("deletion, corpus-capped WER", "deletion, utterance-capped WER"),
            *("insertion, corpus-capped WER", "insertion, utterance-capped WER"),
        )
    )
    return {"tab1": tab1, "tab6": tab6}


def test_planted_findings_are_found():
    found = judge({"base/en": sample(), "base/it": sample(-0.1, seed=1, audio="it")}, tables())
    found = found.set_index(["finding", "where"])
    assert found.index.is_unique
    own = found.xs("base/en", level="where")
    x, h = FACTORS
    expected = {
        "averaging over heads helps": 0.275 / x,
        "averaging over layers helps": 0.075 / x,
        "averages beat single heads": 0.35 / x,
        "the last layers are best": 0.05 / x,
        "about half of the input's relevance": 0.55 / x,
        "52 to 75 % of the encoder's saliency": 0.65 / h,
        "encoder saliency correlates more": 0.65 / h - 0.55 / x,
        BEST_REDUCTION: 9.0,
        "SM^X reduced beats CA": 20.0,
        "full resolution beats reduced": 2.0,
    }
    assert own.value.to_dict() == pytest.approx(expected, abs=0.005)
    for finding in ("averaging over heads helps", "averages beat single heads", "the last layers are best"):
        assert own.value[finding] == pytest.approx(expected[finding], abs=1e-9)  # equal in all utterances
    undecided = own.index[own.verdict != "holds"].tolist()
    assert undecided == ["full resolution beats reduced"] and own.verdict[undecided].item() == "undecided"
    assert found.verdict[ENGLISH, "base, en and it"] == "holds"
    assert found.value[ENGLISH, "base, en and it"] == pytest.approx(0.1 / x, abs=0.01)
    assert own.reliability["encoder saliency correlates more"] == pytest.approx(0.8)  # the lower one
    assert own.reliability["52 to 75 % of the encoder's saliency"] == pytest.approx(0.9)
    assert set(own.n) == {10}
    worse = judge({}, tables("2d_avg")).set_index("finding")
    assert worse.verdict[BEST_REDUCTION] == "does not hold" and worse.value[BEST_REDUCTION] == -9.0


def test_intervals_are_student_s_and_widened_for_the_number_of_rows():
    """The halves lose the same share in every utterance, so the jackknife divides every value by one factor."""
    samples = {f"base/{each}": sample(seed=seed) for seed, each in enumerate(("en", "it", "en-it"))}
    found = judge(samples, {}).set_index(["finding", "where"])
    for finding, which, factor in (
        ("about half of the input's relevance", "input", FACTORS[0]),
        ("52 to 75 % of the encoder's saliency", "encoder", FACTORS[1]),
    ):
        for condition, rho in samples.items():
            row = found.loc[finding, condition]
            student = stats.ttest_1samp(overall(rho, which) / factor, 0)
            assert (row.low, row.high) == pytest.approx(student.confidence_interval(0.95))
            assert (row.corrected_low, row.corrected_high) == pytest.approx(student.confidence_interval(1 - 0.05 / 3))
    row = found.loc["encoder saliency correlates more", "base/it"]
    own = samples["base/it"]
    student = stats.ttest_rel(overall(own, "encoder") / FACTORS[1], overall(own, "input") / FACTORS[0])
    assert (row.low, row.high) == pytest.approx(student.confidence_interval(0.95))
    assert (row.corrected_low, row.corrected_high) == pytest.approx(student.confidence_interval(1 - 0.05 / 3))


def test_rows_of_tables_are_widened_for_their_number():
    tab1 = tables()["tab1"].query("quantity == 'deletion'")
    tab1 = pd.concat([tab1, tab1.assign(minus="1d_max_1d_avg")])
    found = judge({}, {"tab1": tab1}).query("finding == @BEST_REDUCTION")
    half = 4.0 * stats.t.ppf(1 - 0.025 / 2, 9) / stats.t.ppf(1 - 0.025, 9)
    np.testing.assert_allclose(found[["low", "high"]], [[5.0, 13.0]] * 2)
    np.testing.assert_allclose(found[["corrected_low", "corrected_high"]], [[9.0 - half, 9.0 + half]] * 2)


def test_the_correction_can_turn_a_verdict_into_undecided():
    row = tables()["tab1"].query("quantity == 'deletion'").assign(value=4.0, low=0.1, high=7.9)
    alone = judge({}, {"tab1": row}).query("finding == @BEST_REDUCTION")
    many = judge({}, {"tab1": pd.concat([row] * 4)}).query("finding == @BEST_REDUCTION")
    assert alone.verdict.tolist() == ["holds"] and alone.corrected_low.item() == pytest.approx(0.1)
    assert many.verdict.tolist() == ["undecided"] * 4
    np.testing.assert_allclose(many.low, 0.1)


def test_without_an_effect_the_chance_of_any_verdict_is_5_percent():
    rng, rows, n, wrong, uncorrected = np.random.default_rng(0), 5, 12, 0, 0
    like = tables(n=n)["tab1"].query("quantity == 'deletion'")
    like = pd.concat([like.assign(minus=f"other {number}") for number in range(rows)])
    families = 300
    for _ in range(families):
        intervals = np.array([mean_interval(values) for values in rng.normal(size=(rows, n))])
        own = like.assign(**dict(zip(("value", "low", "high"), intervals.T, strict=True)))
        found = judge({}, {"tab1": own}).query("finding == @BEST_REDUCTION")
        assert len(found) == rows
        wrong += (found.verdict != "undecided").any()
        uncorrected += ((found.low > 0) | (found.high < 0)).any()
    assert 0.02 < wrong / families < 0.08
    assert uncorrected / families > 0.17  # 1 - 0.95 ** 5 is 0.23


def test_choosing_the_best_layer_on_other_utterances_removes_the_optimism():
    """No layer is better than another; chosen on the same utterances, the best of six looks better than that of two."""
    rng, n, simulations, same, others = np.random.default_rng(1), 12, 1500, [], []
    for _ in range(simulations):
        groups = [rng.normal(0, 0.1, (n, layers)) for layers in (2, 6)]
        same.append(np.subtract(*(values.mean(axis=0).max() for values in groups)))
        others.append(np.subtract(*(chosen_on_others(values).mean() for values in groups)))
    # The expected maximum of 2 and of 6 standard normal variables is 0.5642 and 1.2672.
    assert np.mean(same) == pytest.approx((0.5642 - 1.2672) * 0.1 / np.sqrt(n), abs=0.002)
    assert np.mean(others) == pytest.approx(0, abs=0.005)


def test_the_interval_of_the_best_layer_covers_it_if_one_layer_stands_out():
    rng, n, simulations, covered = np.random.default_rng(3), 12, 1000, 0
    truth = np.array([0.4, 0.5, 0.7, 0.5])
    for _ in range(simulations):
        best = chosen_on_others(rng.normal(truth, 0.1, (n, 4)))
        _, low, high = jackknife_interval(lambda rows, values=best: values[rows].mean(), n)
        covered += bool(low < 0.7 < high)
    assert 0.92 < covered / simulations < 0.98


def test_equal_layers_are_not_called_best():
    """The findings about layers on noise alone, through `judge`: 20 conditions without a best layer or head."""
    rng, n = np.random.default_rng(2), 8
    samples = {}
    for number in range(20):
        rho = sample(n=n)
        values = rng.normal(0.5, 0.05, (n, 4, 2))
        own = {"by_layer_and_head": values, "by_layer": rng.normal(0.5, 0.05, (n, 4)), "overall": np.full(n, 0.5)}
        for name, each in own.items():
            rho[name].loc[{"saliency": "input", "masks": "all"}] = each
        rho.overall.loc[{"saliency": "input", "masks": "half"}] = 0.5 / 1.1
        samples[f"base/{number}"] = rho.sel(saliency=["input"])
    found = judge(samples, {}).set_index("finding")
    for finding in ("the last layers are best", "averages beat single heads", "averaging over heads helps"):
        own = found.loc[finding]
        assert len(own) == 20 and (own.verdict == "undecided").mean() >= 0.95
        assert abs(own.value.mean()) < 4 * own.value.std() / np.sqrt(20)


@pytest.mark.parametrize(
    ("changes", "judgement"),
    [
        ({"n": 7}, "too noisy"),
        ({"n": 8}, "holds"),
        ({"reliability": (0.49, 0.9)}, "too noisy"),
        ({"reliability": (0.51, 0.9)}, "holds"),
        ({"ratio": 2.5}, "too noisy"),  # half of the masks lose so much that there is no limit
        ({"ratio": 1.1}, "holds"),
    ],
)
def test_few_utterances_and_noisy_maps_have_no_verdict(changes, judgement):
    other = {"seed": 1, "audio": "it"} | changes
    found = judge({"base/en": sample(**changes), "base/it": sample(-0.1, **other)}, {})
    found = found[found.verdict != "not available"].set_index(["finding", "where"])
    input_alone = ["averaging over heads helps", "averages beat single heads", "the last layers are best", ENGLISH]
    for finding in (*input_alone, "encoder saliency correlates more"):
        assert set(found.loc[finding].verdict) == {judgement}, finding
    if "reliability" in changes:
        np.testing.assert_allclose(found.loc["averages beat single heads"].reliability, changes["reliability"][0])
        assert (found.loc["52 to 75 % of the encoder's saliency"].verdict != "too noisy").all()
    table = judge({}, tables(n=changes.get("n", 10), reliability=changes.get("reliability", (0.8,))[0]))
    expected = "holds" if "ratio" in changes else judgement
    assert table.set_index("finding").verdict[BEST_REDUCTION] == expected


def test_maps_without_scores_are_judged_as_measured():
    rho = sample()
    rho["reliability"] = rho.reliability * np.nan
    rho.overall.loc[{"masks": "half"}] = np.nan
    rho.attrs["without_scores"] = ["input", "encoder"]
    found = judge({"base/en": rho}, tables(reliability=np.nan)).set_index("finding")
    assert found.value["averages beat single heads"] == pytest.approx(0.35)
    assert found.value["encoder saliency correlates more"] == pytest.approx(0.1)
    assert found.verdict["about half of the input's relevance"] == "holds"
    assert found.verdict[BEST_REDUCTION] == "holds" and found.reliability.isna().all()


def test_models_are_compared_in_the_same_direction():
    found = judge({"small/en": sample(), "large/en": sample(0.2)}, tables()).set_index("finding")
    assert found.verdict[SCALE] == "does not hold"
    assert found.value[SCALE] == pytest.approx(0.2 / 0.9)
    three = judge({"base/en": sample(0.01), "small/en": sample(), "large/en": sample(0.05)}, tables())
    three = three[three.finding == SCALE].set_index("where")
    expected = {"base and small, en": -0.01, "base and large, en": 0.04, "small and large, en": 0.05}
    assert three.value.to_dict() == pytest.approx({where: value / 0.9 for where, value in expected.items()})
    assert (three.verdict == "holds").all()
    released = judge({"fama-small/it": sample(), "fama-medium/it": sample(0.02)}, tables())
    assert "fama-small and fama-medium, it" in set(released["where"])


def test_directions_of_the_same_audio_are_compared_in_pairs():
    pairs = {"base/en": sample(), "base/en-it": sample(-0.001)}
    narrow = judge(pairs, tables()).set_index("finding").loc[ENGLISH]
    assert narrow.verdict == "holds" and narrow.high - narrow.low < 1e-6
    pairs["base/en-it"] = pairs["base/en-it"].assign_coords(utterance=[f"it{i}" for i in range(10)])
    wide = judge(pairs, tables()).set_index("finding").loc[ENGLISH]
    assert wide.verdict == "undecided" and wide.value == pytest.approx(narrow.value)


def test_other_recordings_are_compared_by_welch_s_interval():
    samples = {"base/en": sample(n=10), "base/it": sample(-0.02, seed=3, audio="it", n=14)}
    row = judge(samples, {}).set_index("finding").loc[ENGLISH]
    values = [overall(rho) / FACTORS[0] for rho in samples.values()]
    welch = stats.ttest_ind(*values, equal_var=False).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx(welch) and row.n == 10
    assert row.value == pytest.approx(values[0].mean() - values[1].mean())


def test_recordings_of_two_languages_are_not_paired_though_both_are_numbered_from_0():
    numbered = {"utterance": [str(i) for i in range(10)]}
    samples = {
        f"base/{direction}": sample(shift).assign_coords(numbered)
        for direction, shift in {"en": 0.0, "en-it": -0.001, "it": -0.001}.items()
    }
    found = judge(samples, tables()).set_index(["finding", "where"]).loc[ENGLISH]
    assert found.verdict.to_dict() == {"base, en and en-it": "holds", "base, en and it": "undecided"}


def test_findings_whose_data_are_missing_are_not_available():
    found = judge({"base/en": sample().sel(saliency=["input"])}, {}).set_index(["finding", "where"])
    whole = judge({"base/en": sample()}, tables()).set_index(["finding", "where"])
    missing = found[found.verdict == "not available"]
    assert set(missing.index.unique("finding")) == {
        *("52 to 75 % of the encoder's saliency", "encoder saliency correlates more"),
        *(BEST_REDUCTION, "SM^X reduced beats CA", "full resolution beats reduced"),
    }
    numbers = ["value", "low", "high", "corrected_low", "corrected_high", "reliability"]
    assert missing[numbers].isna().all(axis=None) and (missing.n == 0).all()
    rest = found.drop(missing.index)
    assert len(rest) == 5
    pd.testing.assert_frame_equal(rest, whole.loc[rest.index])


def test_the_best_reduction_is_judged_by_deletion_and_rho_alone():
    measured = tables()["tab1"]
    rho = {"quantity": "reported", "minus": "2d_avg", "value": 0.1, "low": 0.05, "high": 0.15}
    both = pd.concat([measured, measured[measured.quantity == "rho"].assign(**rho)])
    columns = ["finding", "where", "statistic", "value", "verdict"]
    found = judge({}, {"tab1": both[both.quantity == "reported"]})[columns]
    found = found[found.finding == BEST_REDUCTION].drop(columns="finding")
    assert found.iloc[0].drop("value").tolist() == ["", "needs deletion in tab1", "not available"]
    assert found.iloc[1:].values.tolist() == [["base/en", "reported, 2d_max minus 2d_avg", 0.1, "holds"]]
    whole = judge({}, {"tab1": both}).set_index("finding").loc[BEST_REDUCTION]
    assert whole.statistic.tolist() == ["deletion, 2d_max minus 2d_avg", "reported, 2d_max minus 2d_avg"]
    unknown = both.assign(value=both.value.where(both.quantity != "reported"))
    assert judge({}, {"tab1": unknown}).set_index("finding").loc[BEST_REDUCTION].verdict.tolist() == [
        *("holds", "too noisy"),
    ]


def test_verdicts_are_counted_for_each_finding():
    table = pd.DataFrame({"finding": ["b", "b", "a"], "verdict": ["holds", "too noisy", "holds"]})
    counts = summary(table)
    assert counts.index.tolist() == ["b", "a"]
    assert counts.columns.tolist() == ["holds", "does not hold", "undecided", "too noisy", "not available"]
    assert counts.values.tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


def test_findings_with_another_verdict_elsewhere_are_listed():
    here = judge({"base/en": sample(), "base/it": sample(-0.1, seed=1, audio="it")}, tables())
    there = judge({"base/en": sample()}, tables("2d_avg"))
    different, shared = changed(here, there)
    assert shared == len(there) < len(here)
    (row,) = different.itertuples(index=False)
    assert row[:3] == (BEST_REDUCTION, "base/en", "deletion, 2d_max minus 2d_avg")
    assert row[3:] == (9.0, -9.0, 0.8, "holds", "does not hold")
    assert changed(here, here)[0].empty


def test_only_opposite_verdicts_contradict():
    verdicts = ["holds", "does not hold", "holds", "undecided", "too noisy", "not available"]
    theirs = ["does not hold", "holds", "undecided", "does not hold", "holds", "holds"]
    table = pd.DataFrame({"finding": list("abcdef"), "where": "base/en", "statistic": "s", "reliability": 0.8})
    moved, shared = changed(table.assign(value=1.0, verdict=verdicts), table.assign(value=2.0, verdict=theirs))
    assert (shared, moved.finding.tolist()) == (6, list("abcdef"))
    assert contradictions(moved).finding.tolist() == ["a", "b"]
    assert contradictions(moved.head(0)).empty


def test_reported_correlations_are_compared_for_all_layers_together():
    columns = ["model", "direction", "saliency", "layer", "rho", "reported"]
    rows = [
        ("base", "en", "input", "1", 0.1, 0.2),
        ("base", "en", "input", "mean", 0.4, 0.5),
        ("base", "en", "encoder", "mean", 0.5, np.nan),
        ("base", "en", "difference", "mean", 0.1, 0.1),
        ("small", "it", "input", "mean", 0.3, 0.3),
    ]
    table = pd.DataFrame(rows, columns=columns)
    reference = table.assign(reported=[0.9, 0.45, 0.6, 0.9, 0.9]).query("model == 'base'")
    found = compare_reported(table, reference)
    assert found.columns.tolist() == ["model", "direction", "saliency", "reported", "reference", "difference"]
    assert found.saliency.tolist() == ["input", "encoder"]
    np.testing.assert_allclose(
        found[["reported", "reference", "difference"]], [[0.5, 0.45, 0.05], [np.nan, 0.6, np.nan]]
    )
