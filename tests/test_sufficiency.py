"""Cues against targets: predictions of held-out models, recordings without speech, areas under curves."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import xattn
from reproduction.sufficiency import (
    CUES,
    FEWEST,
    TARGETS,
    detection,
    held_out,
    looped,
    not_speech,
    recordings,
    single_cues,
    table_of_cues,
)


def cue_table(models=3, utterances=30, noise=0.02, seed=0):
    """Cues at random, of which the first determines SM^X's rho in every model; word times are unknown."""
    rng, rows = np.random.default_rng(seed), []
    for model in range(models):
        for utterance in range(utterances):
            values = dict(zip(CUES, rng.standard_normal(len(CUES)), strict=True))
            rho = 0.5 + 0.1 * values[CUES[0]] + noise * rng.standard_normal()
            rows.append({"model": f"m{model}", "condition": "en", "utterance": str(utterance), **values})
            rows[-1] |= {"SNR": np.nan, "rho, SM^X": rho, "rho, SM^H": rng.random(), "start of word": np.nan}
    return pd.DataFrame(rows)


def test_a_cue_that_determines_a_target_predicts_it_for_a_model_that_was_not_seen():
    found = held_out(cue_table()).set_index(["target", "model", "measure"]).sort_index()
    assert set(found.index.get_level_values("target")) == set(TARGETS[:2])
    for model in ("m0", "m1", "m2"):
        own = found.loc["rho, SM^X", model]
        assert own.value["rank"] > 0.8 and own.low["rank"] < own.value["rank"] < own.high["rank"]
        assert own.value["error"] < 0.7 * own.value["error without cues"] and (own.n == 30).all()
        assert abs(found.value["rho, SM^H", model, "rank"]) < 0.5


def test_a_single_model_has_nothing_to_be_predicted_from():
    assert held_out(cue_table(models=1)).empty


def test_single_cues_are_rank_correlations_within_conditions():
    table = cue_table()
    found = single_cues(table).set_index(["target", "cue"])
    assert "SNR" not in found.index.get_level_values("cue")
    for cue in CUES:
        expected = [stats.spearmanr(part[cue], part["rho, SM^X"])[0] for _, part in table.groupby("model")]
        assert found.value["rho, SM^X", cue] == pytest.approx(np.mean(expected))
    assert found.value["rho, SM^X", CUES[0]] > 0.7 and (found.n == 3).all()


def test_a_single_condition_has_intervals_over_utterances():
    table = cue_table(models=1)
    found = single_cues(table).set_index(["target", "cue"])
    assert (found.n == 30).all()
    own = found.loc["rho, SM^H", CUES[1]]
    expected = stats.spearmanr(table[CUES[1]], table["rho, SM^H"]).statistic
    # Close to the interval by Fisher's transformation, which for ranks has a variance of about 1.06 / (n - 3).
    half = stats.norm.ppf(0.975) * np.sqrt(1.06 / 27)
    low, high = np.tanh(np.arctanh(expected) + half * np.array([-1, 1]))
    assert own.value == pytest.approx(expected)
    assert own.low == pytest.approx(low, abs=0.12) and own.high == pytest.approx(high, abs=0.12)


def test_detection_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    speech = pd.DataFrame(rng.standard_normal((20, len(CUES))), columns=[*CUES])
    others = pd.DataFrame(1 + rng.standard_normal((10, len(CUES))), columns=[*CUES]).assign(kind="noise")
    few = others.iloc[: FEWEST - 1].assign(kind="rare")
    found = detection(speech, pd.concat([others, few]))
    assert set(found.kind) == {"noise"}
    for row in found.itertuples():
        pairs = others[row.cue].to_numpy()[:, None] > speech[row.cue].to_numpy()
        assert row.value == pytest.approx(pairs.mean()) and 0 <= row.low <= row.value <= row.high <= 1


def test_recordings_without_speech_are_reproducible_and_in_range():
    first, again = list(not_speech(2)), list(not_speech(2))
    assert [kind for kind, _ in first] == ["near silence", "noise", "music"] * 2
    for (_, audio), (_, same) in zip(first, again, strict=True):
        assert audio.dtype == np.float32 and len(audio) == 64000 and np.array_equal(audio, same)
        assert 0 < np.abs(audio).max() < 0.2
    assert not np.array_equal(first[1][1], first[4][1])
    loop = looped(np.arange(32000, dtype=np.float32), seconds=0.5, times=3)
    assert np.array_equal(loop, np.tile(np.arange(8000), 3))


def test_cues_of_maps_and_of_recordings(model, utterances):
    texts = [model.text(model.generate(model.features(each.audio())[None], "en")[0]) for each in utterances]
    occlusion = xattn.Occlusion(60, 60, reliability=1.0)
    maps = [
        xattn.explain(model, each, text=text, occlusion=occlusion, progress=False)
        for each, text in zip(utterances, texts, strict=True)
    ]
    table = table_of_cues(model, maps, utterances)
    for row, each in zip(table.itertuples(), maps, strict=True):
        assert row.utterance == each.utterance
        rho = float(xattn.correlate(each.cross_attention, each.encoder_saliency).overall)
        assert table["rho, SM^H"][row.Index] == pytest.approx(rho / np.sqrt(each.encoder_reliability))
    speech, others = recordings(model, utterances, "en")
    kinds = ("another text", "loop", "near silence", "noise", "music")
    assert others.kind.value_counts().to_dict() == dict.fromkeys(kinds, 2)
    np.testing.assert_allclose(speech[[*CUES]], table[[*CUES]], rtol=1e-3)
