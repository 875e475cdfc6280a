"""Times of the words that a model wrote, from its cross-attention or another attribution, and files of them."""

from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pysubs2
import xarray as xr
from praatio.data_classes.interval_tier import IntervalTier
from praatio.data_classes.textgrid import Textgrid

from xattn.analysis.localisation import KINDS, PUNCTUATION, token_kinds
from xattn.analysis.normalisation import standardise_over_tokens
from xattn.files import replacing, write_whole
from xattn.maps import on_steps, selected_word_numbers

COLUMNS = ("word", "start", "end", "confidence", "saliency_delay")
FORMATS = (".csv", ".srt", ".vtt", ".TextGrid")
# Chosen on TIMIT. Values chosen on half of its speakers do as well on the other half (benchmarks/README.md).
ONSET = 0.1  # share of a token's attention that comes before its word starts
QUIET = 0.2  # of the range of levels; steps below are pauses


def word_times(maps: xr.Dataset, attribution: xr.DataArray | None = None) -> pd.DataFrame:
    """Estimate when each word of the hypothesis was spoken.

    The attribution is standardised over tokens. Dynamic time warping then divides the steps among the tokens, in order,
    so that the sum of the standardised weights is highest. If the maps hold `features`, quiet steps count as pauses:
    no word starts or ends there. A word starts at the step at which the sum of its first token's weights, within the
    steps of this token and without pauses, reaches a tenth of its total. It ends with the last step of its last token.
    The first word can start too early, as decoders often attend to the start of the recording when they begin.
    (The steps of a token tend to begin before its word, and those of a pause mostly go to the word after it.) Times are
    edges of encoder steps.

    Punctuation and special tokens take steps but belong to no word's time. A word without letters or digits, such as a
    dash, has no row. Words are what spaces separate.

    Args:
        maps: from `xattn.explain`; a selection of the tokens or of a stretch of time works, too.
        attribution: (token, step) or (token, time, mel), with the tokens of the maps; by default, cross_attention
            averaged over all heads of the upper half of the layers in the maps. The lower layers of a decoder often
            attend to the previous token.

    Returns:
        One row for each word, in order, with the columns
        word: as written, with punctuation;
        start, end: seconds in the recording;
        confidence: from 0 to 1. The highest standardised weight of the word's first token among its own steps, divided
            by its highest weight anywhere. It is 1 if the time warping agrees with the token's peak. It ranks words by
            the error of their start, but only roughly (benchmarks/README.md).
        saliency_delay: seconds by which the peak of SM^X (input_saliency) for this word comes after the peak of the
            attribution. Both are standardised over tokens. Saliency from windows of time is coarse, so that small
            delays mean nothing. NaN if the maps hold no input_saliency.
        Its `attrs` hold end, where the maps end in seconds.

    Raises:
        ValueError: the maps hold no attention and no attribution is given, or it has other tokens than the maps.
    """
    attribution = _by_step(maps, attribution)
    tokens = maps.token.values.tolist()
    if attribution.token.values.tolist() != tokens:
        raise ValueError("The attribution and the maps have different tokens: give an attribution of these maps.")
    weights = attribution.values.astype(np.float64)
    standardised = standardise_over_tokens(weights)
    parts = -(-len(tokens) // weights.shape[1])  # of a step, if there are more tokens than steps
    owner = align(np.repeat(standardised, parts, axis=1))
    edges = _edges(attribution, parts)
    audible = np.repeat(np.where(_quiet(maps, attribution), 0, weights.clip(min=0)), parts, axis=1)
    peaks = _peaks(attribution)
    salient = _peaks(on_steps(maps.input_saliency, maps)) if "input_saliency" in maps else None
    kinds, rows = token_kinds(tokens), []
    for members in _words(maps):
        spoken = members[np.isin(kinds[members], [kind for kind in KINDS if kind != PUNCTUATION])]
        if not len(spoken):
            continue
        first, last = (np.flatnonzero(owner == token) for token in (spoken[0], spoken[-1]))
        passed = np.cumsum(audible[spoken[0], first])
        final = last[audible[spoken[-1], last] > 0]
        highest = standardised[spoken[0]].max()
        rows.append(
            (
                str(maps.word.values[members[0]]),
                edges[first[np.searchsorted(passed, ONSET * passed[-1])], 0],
                edges[(final if len(final) else last)[-1], 1],
                max(0.0, standardised[spoken[0], first // parts].max() / highest) if highest > 0 else 0.0,
                np.nan if salient is None else salient(spoken) - peaks(spoken),
            )
        )
    words = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(COLUMNS[1:], float))
    words.attrs["end"] = float(edges[-1, 1])
    return words


def align(scores: np.ndarray) -> np.ndarray:
    """Divide steps among tokens, in order and at least one step each, so that the sum of their scores is highest.

    This is dynamic time warping in which each step has a single token.

    scores: (token, step), with at most as many tokens as steps. Returns the token of each step, int (step,).
    """
    tokens, steps = scores.shape
    best = np.full(tokens, -np.inf)  # the highest sum up to this step, by the token that owns it
    best[0] = scores[0, 0]
    advanced = np.zeros((steps, tokens), dtype=bool)
    for step in range(1, steps):
        before = np.append(-np.inf, best[:-1])
        advanced[step] = before > best
        best = np.maximum(before, best) + scores[:, step]
    owner = np.full(steps, tokens - 1)
    for step in range(steps - 1, 0, -1):
        owner[step - 1] = owner[step] - advanced[step, owner[step]]
    return owner


def save_words(words: pd.DataFrame, path: str | Path) -> None:
    """Write the words of `word_times` as a table (.csv), subtitles (.srt, .vtt) or for Praat (.TextGrid).

    Times are rounded to milliseconds. The file is written whole or not at all.

    ValueError: the extension is not one of these, or the table has no words. OSError: the file could not be written.
    """
    path = Path(path)
    if not (isinstance(words, pd.DataFrame) and {*COLUMNS[:3]} <= {*words.columns}):
        raise ValueError("There is no table of words to save: give what xattn.word_times returns.")
    kind = path.suffix.lower()
    if kind not in [each.lower() for each in FORMATS]:
        raise ValueError(f"Words cannot be written to {path}: choose a name that ends in {', '.join(FORMATS)}.")
    if kind == ".csv":
        write_whole(path, words.to_csv(index=False, float_format="%.3f").encode())
    elif kind == ".textgrid":
        with replacing(path) as temporary:
            _textgrid(words).save(str(temporary), format="long_textgrid", includeBlankSpaces=True)
    else:
        write_whole(path, _subtitles(words, kind[1:]).encode())


def _by_step(maps: xr.Dataset, attribution: xr.DataArray | None) -> xr.DataArray:
    """The attribution (token, step), by default from the attention of the upper layers."""
    if attribution is None:
        if "cross_attention" not in maps:
            raise ValueError("The maps hold no cross_attention: give the attribution to use.")
        attribution = maps.cross_attention
        if "layer" in attribution.dims:
            attribution = attribution.isel(layer=slice(attribution.sizes["layer"] // 2, None))
    averaged = attribution.mean([dim for dim in ("layer", "head") if dim in attribution.dims])
    return on_steps(averaged, maps).transpose("token", "step")


def _words(maps: xr.Dataset) -> list[np.ndarray]:
    """The tokens of each word, int (n,)."""
    numbers = selected_word_numbers(maps)
    return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]


def _quiet(maps: xr.Dataset, steps: xr.DataArray) -> np.ndarray:
    """Whether the recording is quiet at each step of an array, bool (step,); never if the maps hold no features.

    The level is the mean of the features of a step; the range of levels is that from the 5th to the 95th percentile.
    """
    if "features" not in maps:
        return np.zeros(steps.sizes["step"], dtype=bool)
    level = on_steps(maps.features.expand_dims("token"), maps, "2d_avg")[0]
    low, high = np.percentile(level, [5, 95])
    return np.isin(steps.step, level.step[level.values < low + QUIET * (high - low)])


def _edges(steps: xr.DataArray, parts: int) -> np.ndarray:
    """Start and end of each step within the recording, divided into equal parts: float64 (step * parts, 2)."""
    # `step` is the middle of what lies within the recording.
    start = np.maximum(np.maximum(steps.step_start, 2 * steps.step - steps.step_end), 0).values
    end = np.minimum(steps.step_end, 2 * steps.step - steps.step_start).values
    inner = start[:, None] + (end - start)[:, None] * np.arange(parts + 1) / parts
    # Rounded, so that a step starts exactly where the one before ends.
    return np.stack([inner[:, :-1].ravel(), inner[:, 1:].ravel()], axis=1).round(6)


def _peaks(attribution: xr.DataArray) -> Callable[[np.ndarray], float]:
    """A function from tokens to the time, in seconds, of the highest mean of their standardised weights."""
    values, times = standardise_over_tokens(attribution.transpose("token", "step").values), attribution.step.values
    return lambda tokens: times[values[tokens].mean(axis=0).argmax()]


def _subtitles(words: pd.DataFrame, kind: str) -> str:
    """Subtitles with one word at a time, as "srt" or "vtt"."""
    subtitles = pysubs2.SSAFile()
    for row in words.itertuples():
        text = escape(row.word, quote=False) if kind == "vtt" else row.word
        subtitles.append(pysubs2.SSAEvent(start=round(1000 * row.start), end=round(1000 * row.end), text=text))
    return subtitles.to_string(kind, keep_ssa_tags=True)  # otherwise words in braces would be dropped as styles


def _textgrid(words: pd.DataFrame) -> Textgrid:
    entries = [(round(row.start, 3), round(row.end, 3), row.word) for row in words.itertuples()]
    grid, last = Textgrid(), round(words.attrs.get("end", 0.001), 3)
    grid.addTier(IntervalTier("words", entries, minT=0, maxT=max([last, *(end for _, end, _ in entries)])))
    return grid
