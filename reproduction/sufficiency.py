"""When does attention suffice? Cues that cost nothing, against what only masks or word times can tell."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy import stats

from reproduction.conditions import progress
from reproduction.judging import word_boundaries
from xattn.analysis.correlation import correlate
from xattn.analysis.cues import cues
from xattn.analysis.intervals import jackknife_interval, mean_interval
from xattn.attribution.attention import cross_attention
from xattn.attribution.forced import Forced
from xattn.audio import SAMPLE_RATE
from xattn.data.utterance import Utterance
from xattn.maps import build, frame_times
from xattn.models import S2TModel

CUES = (
    *("entropy", "peakedness", "disagreement", "order", "padding", "level range", "tokens per second"),
    "confidence",
)
TARGETS = ("rho, SM^X", "rho, SM^H", "start of word")
SHRINKAGE = 0.1  # of the ridge regression, relative to the number of utterances
LEAST_ERROR = 0.005  # seconds, below which errors of word times are equal
RECORDINGS = 20  # of speech, and of each kind without it
FEWEST = 3  # recordings of a kind, for an area under its curve


def table_of_cues(model: S2TModel, stored: Iterable[xr.Dataset], corpus: Iterable[Utterance]) -> pd.DataFrame:
    """One row for each utterance: model, condition, utterance, CUES, SNR where known, and TARGETS.

    rho is divided by the square root of the map's reliability, as maps of different conditions differ in it. The
    start of words is the logarithm of the median error in seconds of `xattn.word_times`, NaN without known times.
    """
    utterances, rows = {each.id: each for each in corpus}, []
    for maps in stored:
        utterance = utterances[maps.utterance]
        row = {"model": maps.model, "condition": maps.setting, "utterance": maps.utterance}
        row |= cues(maps, Forced.of(model, maps)) | {"SNR": np.nan if utterance.snr is None else utterance.snr}
        for place, name in (("input", "rho, SM^X"), ("encoder", "rho, SM^H")):
            rho = float(correlate(maps.cross_attention, maps[f"{place}_saliency"]).overall)
            reliability = maps.attrs[f"{place}_reliability"]
            row[name] = rho / np.sqrt(reliability) if reliability > 0 else np.nan
        attention = maps.cross_attention.mean(["layer", "head"])
        error = word_boundaries(attention, maps, utterance).get("start of word, warped", np.nan)
        rows.append(row | {"start of word": np.log(max(error, LEAST_ERROR))})
    return pd.DataFrame(rows)


def single_cues(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each cue with each target within a condition, averaged over conditions.

    Returns a long table: target, cue, value, low, high (95 %), n. Intervals and n are over conditions, or over
    utterances if the table has a single condition.
    """
    alone = len(table[["model", "condition"]].drop_duplicates()) == 1
    rows = []
    for target in TARGETS:
        for cue in (*CUES, "SNR"):
            pairs = [
                part[[cue, target]].to_numpy()
                for _, part in table.dropna(subset=[cue, target]).groupby(["model", "condition"])
                if len(part) > 3 and part[cue].nunique() > 1
            ]
            if pairs and alone:
                interval = jackknife_interval(lambda kept, pair=pairs[0]: _spearman(pair[kept]), len(pairs[0]))
                rows.append((target, cue, *map(float, interval), len(pairs[0])))
            elif pairs:
                values = [_spearman(pair) for pair in pairs]
                rows.append((target, cue, *mean_interval(values), len(values)))
    return pd.DataFrame(rows, columns=["target", "cue", "value", "low", "high", "n"])


def _spearman(pair: np.ndarray) -> float:
    """Spearman's correlation of two columns."""
    return stats.spearmanr(*pair.T).statistic


def held_out(table: pd.DataFrame) -> pd.DataFrame:
    """How well all cues together predict each target for a model that the prediction has not seen.

    A ridge regression on standardised cues is fitted to all other models.

    Returns:
        A long table: target, model, measure, value, low, high (95 % jackknife over utterances), n. "rank" is
        Spearman's correlation of prediction and target; "error" the mean absolute error; "error without cues" that of
        the other models' mean.
    """
    rows = []
    for target in TARGETS:
        known = table.dropna(subset=[target])
        for model in known.model.unique():
            own, others = known[known.model == model], known[known.model != model]
            if own.empty or others.empty:
                continue
            predicted, found = _predict(others, own, target), own[target].to_numpy()
            guess = others[target].mean()
            measures = {
                "rank": lambda rows, p=predicted, y=found: stats.spearmanr(p[rows], y[rows]).statistic,
                "error": lambda rows, p=predicted, y=found: np.abs(p[rows] - y[rows]).mean(),
                "error without cues": lambda rows, g=guess, y=found: np.abs(g - y[rows]).mean(),
            }
            for name, measure in measures.items():
                rows.append((target, model, name, *map(float, jackknife_interval(measure, len(own))), len(own)))
    return pd.DataFrame(rows, columns=["target", "model", "measure", "value", "low", "high", "n"])


def _predict(others: pd.DataFrame, own: pd.DataFrame, target: str) -> np.ndarray:
    mean, deviation = others[list(CUES)].mean(), others[list(CUES)].std().replace(0, 1)
    known, new = (((part[list(CUES)] - mean) / deviation).to_numpy() for part in (others, own))
    centred = others[target].to_numpy() - others[target].mean()
    weights = np.linalg.solve(known.T @ known + SHRINKAGE * len(known) * np.eye(len(CUES)), known.T @ centred)
    return new @ weights + others[target].mean()


def not_speech(number: int, seconds: float = 4.0) -> Iterator[tuple[str, np.ndarray]]:
    """Recordings without speech, `number` of each kind, each with its kind, at 16 kHz: near silence, noise, music.

    Near silence is noise at -80 dB; noise is white, pink or brown; music is a sequence of chords with overtones.
    """
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    for index in range(number):
        rng = np.random.default_rng([44, index])
        yield "near silence", (1e-4 * rng.standard_normal(len(time))).astype(np.float32)
        spectrum = np.fft.rfft(rng.standard_normal(len(time)))
        coloured = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** (index % 3 / 2), len(time))
        yield "noise", (0.1 * coloured / np.abs(coloured).max()).astype(np.float32)
        music = np.zeros(len(time))
        for start in np.arange(0, seconds, 0.5):
            root, since = 110 * 2 ** (rng.integers(0, 24) / 12), np.maximum(time - start, 0)
            for interval in (0, rng.choice([3, 4]), 7):
                tone = root * 2 ** (interval / 12)
                wave = sum(np.sin(2 * np.pi * tone * k * since) / k**2 for k in range(1, 6))
                music += np.where(time >= start, np.exp(-4 * since), 0) * wave
        yield "music", (0.1 * music / np.abs(music).max()).astype(np.float32)


def looped(audio: np.ndarray, seconds: float = 1.0, times: int = 8) -> np.ndarray:
    """The first part of a recording, repeated: what often makes a model repeat itself without end."""
    return np.tile(audio[: round(seconds * SAMPLE_RATE)], times)


@torch.inference_mode()
def cues_of_recording(model: S2TModel, audio: np.ndarray, direction: str, text: str) -> dict[str, float] | None:
    """Cues of a text for a recording, without any masks; None for fewer than two tokens or too many."""
    features, ids = model.features(audio), model.token_ids(text)
    if not 3 <= len(ids) <= model.decoding.max_length - len(model.prompt(direction)):
        return None
    forced = Forced(model, features, ids, torch.cat([model.prompt(direction), ids])[:-1])
    weights = cross_attention(model, forced.encode(features), forced.decoder_inputs)[:, :, forced.rows]
    step_frames = model.step_frames(len(features))
    arrays = {"cross_attention": weights[..., : len(step_frames)], "features": features.cpu().numpy()}
    if weights.shape[-1] > len(step_frames):
        arrays["padding_attention"] = weights[..., len(step_frames) :].sum(axis=-1)
    maps = build(
        arrays,
        tokens=model.tokens(ids),
        times=frame_times(len(features), model.first_frame, model.frame_seconds),
        step_frames=step_frames,
        attributes={},
    )
    return cues(maps, forced)


def recordings(model: S2TModel, corpus: Sequence[Utterance], direction: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cues of the texts of recordings, and of texts that are not in them.

    Returns:
        A table with a row for each utterance, and one for others with the columns kind and written: "another text",
        the loops, and `not_speech`. The cues are NaN where the model wrote fewer than two tokens.
    """
    audios = [each.audio() for each in corpus]
    texts = [_written(model, audio, direction) for audio in progress(audios, "Recordings transcribed")]
    pairs = progress([*zip(audios, texts, strict=True)], "Cues of recordings")
    speech = [cues_of_recording(model, audio, direction, text) for audio, text in pairs]
    others = [("another text", audio, text) for audio, text in zip(audios, [*texts[1:], texts[0]], strict=True)]
    longest = max(map(len, audios))  # what the model surely takes
    unspoken = [("loop", looped(audio)) for audio in audios] + [*not_speech(len(audios))]
    unspoken = [(kind, audio[:longest]) for kind, audio in unspoken]
    unspoken = progress(unspoken, "Recordings without speech transcribed")
    others += [(kind, audio, _written(model, audio, direction)) for kind, audio in unspoken]
    rows = [
        {"kind": kind, "written": text} | ((text and cues_of_recording(model, audio, direction, text)) or {})
        for kind, audio, text in progress(others, "Cues of recordings without speech")
    ]
    return pd.DataFrame([each for each in speech if each]), pd.DataFrame(rows)


def _written(model: S2TModel, audio: np.ndarray, direction: str) -> str:
    return model.text(model.generate(model.features(audio)[None], direction)[0])


def detection(speech: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """How well each cue tells recordings without speech, by kind, from speech: the area under the ROC curve.

    others: with the column `kind`; kinds with fewer than FEWEST texts are left out. An area of 0.5 is chance, and one
    below 0.5 means that the cue is lower than for speech.

    Returns a long table: kind, cue, value, low, high (95 %, Hanley and McNeil 1982), n (of the kind).
    """
    rows = []
    for kind, part in others.dropna(subset="entropy").groupby("kind", sort=False):
        if len(part) < FEWEST:
            continue
        for cue in CUES:
            area = stats.mannwhitneyu(part[cue], speech[cue]).statistic / (len(part) * len(speech))
            half = 1.96 * _area_error(area, len(part), len(speech))
            rows.append((kind, cue, area, max(0.0, area - half), min(1.0, area + half), len(part)))
    return pd.DataFrame(rows, columns=["kind", "cue", "value", "low", "high", "n"])


def _area_error(area: float, first: int, second: int) -> float:
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (first - 1) * (one - area**2) + (second - 1) * (two - area**2)
    return float(np.sqrt(variance / (first * second)))
