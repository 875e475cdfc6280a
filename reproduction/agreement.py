"""What rho says, and where it comes from: rank correlations, kinds of tokens, regions of time, and recordings."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.analysis.correlation import normalised_attention, normalised_saliency, saliencies_of
from xattn.analysis.intervals import jackknife_interval, mean_interval
from xattn.analysis.localisation import KINDS, REGIONS, regions, token_kinds, token_times
from xattn.analysis.reliability import ENOUGH, attenuation_factor, halves_of, is_linear, split_half_reliability
from xattn.data.utterance import Utterance
from xattn.maps import drop_special_tokens

MEASURES: dict[str, Callable] = {"Pearson": stats.pearsonr, "Spearman": stats.spearmanr, "Kendall": stats.kendalltau}
LEAST_CELLS = 20  # of an utterance in a region or of a kind, for a correlation


def compared(maps: xr.Dataset, saliency: str) -> tuple[np.ndarray, np.ndarray]:
    """Attention averaged over layers and heads, and saliency, both (token, step), as rho compares them."""
    attention = normalised_attention(maps.cross_attention.mean(["layer", "head"]))
    return attention.values, normalised_saliency(maps[saliency], maps.cross_attention).values


def rank_correlations(stored: Iterable[xr.Dataset]) -> pd.DataFrame:
    """rho as three correlation coefficients: saliency, measure, value, low, high, n. Pearson's is the paper's."""
    rows = [
        (
            name.removesuffix("_saliency"),
            measure,
            coefficient(*(each.ravel() for each in compared(maps, name))).statistic,
        )
        for maps in stored
        for name in saliencies_of(maps)
        for measure, coefficient in MEASURES.items()
    ]
    table = pd.DataFrame(rows, columns=["saliency", "measure", "value"])
    groups = table.groupby(["saliency", "measure"], sort=False).value
    found = [(*key, *mean_interval(values), len(values)) for key, values in groups]
    return pd.DataFrame(found, columns=["saliency", "measure", "value", "low", "high", "n"])


def by_part(stored: Iterable[xr.Dataset], corpus: Iterable[Utterance]) -> pd.DataFrame:
    """rho within kinds of tokens and within regions of time, and of single tokens.

    Args:
        stored: maps of one condition.
        corpus: the utterances, for the times of their words; without them there are no regions.

    Returns:
        A long table: saliency, part ("everything", "single tokens", one of KINDS or of REGIONS), share (of the cells),
        rho (as measured), low, high, reliability (of the whole map), reported (without noise; empty if the map or the
        part is too noisy), reported_low, reported_high and n, the utterances that have such cells.
    """
    utterances = {each.id: each for each in corpus}
    found = []
    for maps in stored:
        parts = _parts(maps, utterances.get(maps.utterance))
        for name in saliencies_of(maps):
            place = name.removesuffix("_saliency")
            attention, everything = compared(maps, name)
            halves = halves_of(maps, name)
            halves = None if halves is None else drop_special_tokens(halves).values
            reliability = split_half_reliability(halves)
            for part, cells in parts.items():
                rho = _rho_of_part(part, attention, everything, cells)
                half = rho
                if halves is not None:
                    half = np.mean([_rho_of_part(part, attention, each, cells) for each in halves])
                linear = is_linear(maps, place)
                found.append((place, part, cells.mean(), rho, half, linear, reliability))
    columns = ["saliency", "part", "share", "rho", "half", "linear", "reliability"]
    rows = []
    for (saliency, part), group in pd.DataFrame(found, columns=columns).groupby(["saliency", "part"], sort=False):
        known = group.dropna(subset="rho")
        reliability = group.reliability.mean()
        reported = (np.nan,) * 3
        if not reliability < ENOUGH:
            reported = jackknife_interval(lambda chosen, known=known: _limit(known.iloc[chosen]), len(known))
            if len(known) > 1 and np.isnan(reported[1]):  # it has a limit only thanks to one utterance
                reported = (np.nan,) * 3
        measured = mean_interval(known.rho)
        row = saliency, part, group.share.mean(), *measured, reliability, *map(float, reported), len(known)
        rows.append(row)
    intervals = ["rho", "low", "high", "reliability", "reported", "reported_low", "reported_high"]
    return pd.DataFrame(rows, columns=["saliency", "part", "share", *intervals, "n"])


def _parts(maps: xr.Dataset, utterance: Utterance | None) -> dict[str, np.ndarray]:
    """Cells (token, step) of each part, bool; the regions need the words of a transcription."""
    spoken = drop_special_tokens(maps)
    kinds, steps = token_kinds(spoken.token.values), spoken.sizes["step"]
    everything = np.ones((len(kinds), steps), dtype=bool)
    parts = {"everything": everything, "single tokens": everything}
    parts |= {kind: np.repeat((kinds == kind)[:, None], steps, axis=1) for kind in KINDS}
    if utterance is not None and utterance.words and "-" not in maps.setting:
        found = regions(spoken, utterance.words, token_times(spoken, utterance.words, maps.setting))
        parts |= {region: found == region for region in REGIONS}
    return parts


def _rho_of_part(part: str, attention: np.ndarray, saliency: np.ndarray, cells: np.ndarray) -> float:
    if part == "single tokens":
        rows = [np.corrcoef(*pair)[0, 1] for pair in zip(attention, saliency, strict=True) if all(map(np.ptp, pair))]
        return float(np.mean(rows)) if rows else np.nan
    pair = attention[cells], saliency[cells]
    return float(np.corrcoef(*pair)[0, 1]) if cells.sum() >= LEAST_CELLS and all(map(np.ptp, pair)) else np.nan


def _limit(rows: pd.DataFrame) -> float:
    rho, half = rows.rho.mean(), rows.half.mean()
    if rho == half:  # maps without scores, whose noise is unknown
        return float(rho)
    return float(rho / attenuation_factor(rho, half, rows.linear.all()))


def with_recordings(rho: dict[str, xr.Dataset], corpus: Iterable[Utterance]) -> pd.DataFrame:
    """Spearman's correlation of rho with properties of the recordings, where these are known and vary.

    rho: by condition, from `correlate_all`. Properties are the signal-to-noise ratio (dB), the duration (s) and the
    reliability of the map, which says whether noise of the map could be the reason. Returns a long table: condition,
    saliency, property, value (Spearman's r), p, n.
    """
    utterances, rows = {each.id: each for each in corpus}, []
    for condition, each in rho.items():
        own = [utterances.get(name) for name in each.utterance.values]
        for saliency in each.saliency.values.tolist():
            values = each.overall.sel(saliency=saliency, masks="all").values
            properties = {
                "SNR": [item and item.snr for item in own],
                "duration": [item and item.duration for item in own],
                "reliability": each.reliability.sel(saliency=saliency).values.tolist(),
            }
            for name, known in properties.items():
                if None not in known and len(set(known)) > 1 and not np.isnan(known).any():
                    found = stats.spearmanr(known, values)
                    rows.append((condition, saliency, name, found.statistic, found.pvalue, len(known)))
    return pd.DataFrame(rows, columns=["condition", "saliency", "property", "value", "p", "n"])


def by_voice(rho: dict[str, xr.Dataset], corpus: Iterable[Utterance]) -> pd.DataFrame:
    """Mean rho as measured of the utterances of each voice: condition, saliency, voice, value, low, high, n."""
    utterances, rows = {each.id: each for each in corpus}, []
    for condition, each in rho.items():
        voices = np.array([getattr(utterances.get(name), "voice", None) or "" for name in each.utterance.values])
        for saliency in each.saliency.values.tolist():
            values = each.overall.sel(saliency=saliency, masks="all").values
            for voice in sorted(set(voices) - {""}):
                chosen = values[voices == voice]
                rows.append((condition, saliency, voice, *mean_interval(chosen), len(chosen)))
    return pd.DataFrame(rows, columns=["condition", "saliency", "voice", "value", "low", "high", "n"])
