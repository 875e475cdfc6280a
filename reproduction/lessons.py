"""What the lessons share: the maps that they read, and checks that measure a student's answer.

A check takes an answer and what the answer is about. It prints one line: what it measured, and either that this passes
or a hint. For an answer that it cannot measure, it prints what to give.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps

import matplotlib
import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.figure import Figure

from reproduction.tables import ROOT
from xattn.analysis.correlation import correlate, normalised_attention, normalised_saliency
from xattn.analysis.faithfulness import area, masked_inputs, percentages, ranking, sentence_maps
from xattn.analysis.forced_faithfulness import values_without
from xattn.analysis.localisation import peak_distances, token_times
from xattn.analysis.normalisation import standardise
from xattn.analysis.reliability import converged
from xattn.analysis.sanity import planted_auc, planted_map, roc_area
from xattn.attribution.forced import Forced
from xattn.attribution.occlusion import divergence_from
from xattn.attribution.segments import PARTITIONS
from xattn.attribution.settings import Occlusion
from xattn.audio import FRAME_SECONDS
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance, Word, utterance_from_recording
from xattn.explain import FIRST_LOOK, determinants, explain
from xattn.figures import MAP_COLOURS, SATURATION, STYLE, Picture, literal
from xattn.maps import drop_special_tokens
from xattn.models import S2TModel, load_model
from xattn.store import is_current, key_of, load, path_of, save

SHIPPED = "data/lessons"  # maps of Whisper tiny.en, made by recipes/lessons.py
OWN = "figures/lab/lessons"  # maps of the reader's recordings
HIDDEN_SECONDS = 0.15  # of the recording that `divergence_when_hidden` hides
STEP = 10  # per cent of the cells between two points of a deletion curve


class CannotMeasure(Exception):
    """An answer is missing or has the wrong form; the message says what to give."""


def check(measure: Callable[..., tuple[bool, str, str]]) -> Callable[..., None]:
    """Turn a function into a check, which prints one line and returns nothing.

    measure: takes an answer and other arguments; returns whether the answer passes, what was measured, and a hint.
    """

    @wraps(measure)
    def checked(answer, *others) -> None:
        try:
            passed, measured, hint = measure(answer, *others)
        except CannotMeasure as error:
            print(f"Nothing to measure yet: {error}")
        else:
            print(f"Passed: {measured}" if passed else f"Not yet: {measured} {hint}")

    return checked


def numbers_of(answer, wanted: str, *limits: tuple[float, float]) -> list[float]:
    """The numbers of an answer, one between each pair of limits. CannotMeasure: the answer is something else."""
    try:
        given = [*np.asarray(answer, dtype=object).ravel()]
        values = np.array([np.nan if isinstance(each, bool | np.bool_) else each for each in given], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if len(values) != len(limits) or not all(
        low <= value <= high for value, (low, high) in zip(values, limits, strict=True)
    ):
        raise CannotMeasure(f"give {wanted}.")
    return values.tolist()


def whole(value: float, wanted: str) -> int:
    """A whole number. CannotMeasure: it is not whole."""
    if value != int(value):
        raise CannotMeasure(f"give {wanted}.")
    return int(value)


def result_of(answer, given, shape: tuple[int, ...], wanted: str) -> np.ndarray:
    """What a function returns, as finite numbers of a shape. CannotMeasure: it is no function, or returns no such."""
    if not callable(answer):
        raise CannotMeasure(f"give {wanted}.")
    try:
        values = np.asarray(answer(given), dtype=np.float64)
    except Exception as error:  # a student's function can raise anything
        reason = " ".join(str(error).split())
        raise CannotMeasure(f"your function stopped with {type(error).__name__} ({reason}); give {wanted}.") from None
    if values.shape != shape or not np.isfinite(values).all():
        raise CannotMeasure(f"your function returned {_described(values)} instead of {shape} finite numbers.")
    return values


def _described(values: np.ndarray) -> str:
    return f"numbers of the shape {values.shape}" if np.isfinite(values).all() else "numbers that are not all finite"


# Lesson 1: planted cells


def planted_cells(features: xr.DataArray) -> xr.DataArray:
    """A rectangle of 0.2 s and a fifth of the bands in the middle of a spectrogram: bool (time, mel)."""
    cells = xr.zeros_like(features, dtype=bool)
    middle, bands = features.sizes["time"] // 2, features.sizes["mel"] // 4
    cells[middle : middle + round(0.2 / FRAME_SECONDS), bands : bands + features.sizes["mel"] // 5] = True
    return cells


def planted_figure(planted: xr.DataArray, features: xr.DataArray, numbers: Sequence[int]) -> Figure:
    """Draw the planted cells and the maps of so many masks."""
    drawn = {"planted cells": planted.values.astype(float)}
    for number in numbers:
        cells = planted_map(features.values, planted.values, "superpixels", number)
        drawn[f"{number} masks, area {roc_area(cells, planted.values):.2f}"] = cells
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(3 * len(drawn), 2.2), layout="constrained")
        for axes, (title, cells) in zip(figure.subplots(1, len(drawn), sharey=True), drawn.items(), strict=True):
            axes.imshow(cells.T, aspect="auto", origin="lower", interpolation="none", cmap=MAP_COLOURS)
            axes.set_title(title)
            axes.set_xlabel("frame")
        figure.axes[0].set_ylabel("Mel band")
    return figure


@check
def check_masks(answer, planted: xr.DataArray, features: xr.DataArray) -> tuple[bool, str, str]:
    """Measure whether superpixel masks, given as (number, p), find planted cells: at least 0.95 with at most 500."""
    wanted = "(masks, p) with 2 to 500 masks and p from 0.01 to 0.99"
    number, p = numbers_of(answer, wanted, (2, 500), (0.01, 0.99))
    number = whole(number, wanted)
    found = roc_area(planted_map(features.values, planted.values, "superpixels", number, p=p), planted.values)
    measured = f"{number} masks with p = {p:g} find the planted cells with an area of {found:.3f}; 0.95 is enough."
    return found >= 0.95, measured, "Hint: more masks average out what else each mask hides."


@check
def check_planted_for_windows(answer, features: xr.DataArray) -> tuple[bool, str, str]:
    """Measure whether 120 masks of windows find other planted cells, bool (time, mel): an area of at least 0.98."""
    try:
        planted = np.asarray(answer)
    except ValueError:  # rows of different lengths
        planted = np.empty(0)
    if planted.dtype != bool or planted.shape != features.shape or not 100 <= planted.sum() <= planted.size / 2:
        raise CannotMeasure(
            f"give True and False of the shape {features.shape}, with at least 100 and at most half True."
        )
    found = planted_auc(features.values, planted, "windows", 120)
    measured = f"120 masks of windows find your cells with an area of {found:.3f}; 0.98 is enough."
    return found >= 0.98, measured, "Hint: a window hides all bands of its time at once, so it cannot tell them apart."


# Lesson 2: attention sinks


def spoken_attention(maps: xr.Dataset) -> xr.DataArray:
    """Attention averaged over layers and heads, without special tokens: (token, step)."""
    attention = drop_special_tokens(maps).cross_attention
    return attention.mean([axis for axis in ("layer", "head") if axis in attention.dims])


def hit_rate(
    normalise: Callable[[np.ndarray], np.ndarray], stored: Sequence[xr.Dataset], corpus: Mapping[str, Utterance]
) -> float:
    """The share of tokens whose highest attention, once normalised, falls into the word that was spoken.

    normalise: takes and returns an array (token, step); corpus: utterances with word times, by id.
    """
    distances = []
    for maps in stored:
        attention = spoken_attention(maps)
        values = result_of(
            normalise, attention.values.astype(np.float64), attention.shape, "a function of an array (token, step)"
        )
        times = token_times(attention, corpus[maps.utterance].words, maps.setting)
        distances.append(peak_distances(attention.copy(data=values), times))
    distances = np.concatenate(distances)
    return float(np.mean(distances[~np.isnan(distances)] == 0))


@check
def check_normalisation(answer, stored: Sequence[xr.Dataset], corpus: Mapping[str, Utterance]) -> tuple[bool, str, str]:
    """Measure the hit rate of attention after a function of an array (token, step): at least 0.75."""
    rate = hit_rate(answer, stored, corpus)
    measured = f"the highest step is inside the right word for {rate:.0%} of the tokens; 75 % is enough."
    hint = "Hint: a sink is high for every token. Compare each step with the same step of the other tokens."
    return rate >= 0.75, measured, hint


@check
def check_sink(answer, maps: xr.Dataset) -> tuple[bool, str, str]:
    """Measure how many tokens attend most to within 0.1 s of a time: at least 30 %."""
    end = float(maps.step_end[-1])
    (seconds,) = numbers_of(answer, f"a time from 0 to {end:.2f} s", (0, end))
    attention = spoken_attention(maps)
    share = float((abs(attention.idxmax("step") - seconds) <= 0.1).mean())
    measured = f"{share:.0%} of the tokens attend most to within 0.1 s of {seconds:.2f} s; 30 % is enough."
    return share >= 0.3, measured, "Hint: look for a bright column in the left picture."


@check
def check_chance(answer, stored: Sequence[xr.Dataset], corpus: Mapping[str, Utterance]) -> tuple[bool, str, str]:
    """Measure the hit rate of random maps, and compare: within 3 percentage points."""
    (guess,) = numbers_of(answer, "a share from 0 to 1", (0, 1))
    rng = np.random.default_rng(0)
    chance = np.mean([hit_rate(lambda attention: rng.random(attention.shape), stored, corpus) for _ in range(20)])
    measured = f"random maps hit the right word for {chance:.1%} of the tokens, and your answer is {guess:.1%}."
    return abs(guess - chance) <= 0.03, measured, "Hint: how much of its recording does a word fill on average?"


def panels(maps: Mapping[str, xr.DataArray], words: Sequence[Word] = ()) -> Figure:
    """Draw maps (token, step) of the same tokens side by side, in standard deviations above each row's mean."""
    tokens = [literal(token) for token in next(iter(maps.values())).token.values]
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(1 + 4 * len(maps), 1 + 0.19 * len(tokens)), layout="constrained")
        for axes, (title, each) in zip(figure.subplots(1, len(maps), sharey=True), maps.items(), strict=True):
            extent = (float(each.step_start[0]), float(each.step_end[-1]), len(tokens) - 0.5, -0.5)
            values, drawn = standardise(each.values), {"interpolation": "none", "cmap": MAP_COLOURS, "vmin": 0}
            axes.imshow(values, aspect="auto", extent=extent, vmax=SATURATION, **drawn)
            for edge in {time for word in words for time in (word.start, word.end)}:
                axes.axvline(edge, color="white", linewidth=0.5, alpha=0.6)
            axes.set_title(literal(title))
            axes.set_xlabel("time (s)")
        figure.axes[0].set_yticks(range(len(tokens)), tokens)
    return figure


def attention_and_saliency(maps: xr.Dataset, words: Sequence[Word] = ()) -> Figure:
    """Draw attention before any normalisation beside input saliency."""
    attention = spoken_attention(maps)
    saliency = normalised_saliency(maps.input_saliency, attention)
    return panels({"Cross-attention": attention, "Input saliency": saliency}, words)


# Lessons 3 and 8: recordings of real models


@dataclass(frozen=True)
class Explained:
    """A recording with its maps and, if the model is there, its forced output for more passes."""

    utterance: Utterance
    maps: xr.Dataset
    forced: Forced | None


def explained(model: str = "", recording: str = "", shipped: str = "en-dev-0010") -> Explained:
    """Explain a recording, or read the shipped maps of Whisper tiny.en if neither model nor recording is given.

    Maps of own recordings are kept in figures/lab/lessons, so that a second call takes no time.

    Args:
        model: see `xattn.load_model`.
        recording: a file, also one beside the open notebook.
        shipped: the recording of the corpus whose maps are read otherwise.

    Raises:
        ValueError: only one of model and recording is given, there are no such shipped maps, or see `xattn.explain`.
        FileNotFoundError: there is no such recording or model.
    """
    if bool(model) != bool(recording):
        raise ValueError("Only one of model and recording is set: set both, or leave both empty for the shipped maps.")
    if not model:
        known = sorted(path.name.removesuffix(".zarr.zip") for path in (ROOT / SHIPPED).rglob("*.zarr.zip"))
        if shipped not in known:
            raise ValueError(f"There are no shipped maps of {shipped!r}: choose one of {', '.join(known)}.")
        maps = load(path_of(ROOT / SHIPPED, "faster-whisper-tiny.en", "en", shipped))
        utterance = next(each for each in load_corpus(ROOT / "data", language="en") if each.id == shipped)
        print(f"Transcript of Whisper tiny.en: {maps.hypothesis}")
        return Explained(utterance, maps, None)
    s2t, utterance = load_model(model), utterance_from_recording(recording)
    occlusion = Occlusion(**FIRST_LOOK)
    path = path_of(OWN, s2t.name, "recordings", utterance.id)
    key = key_of(determinants(s2t, utterance.audio().tobytes(), utterance.id, occlusion.on(s2t)))
    if not is_current(path, key):
        save(explain(s2t, utterance, occlusion=occlusion), path, key)
    maps = load(path)
    print(f"Transcript of {s2t.name}: {maps.hypothesis}")
    return Explained(utterance, maps, Forced.of(s2t, maps))


@torch.inference_mode()
def divergence_when_hidden(forced: Forced, maps: xr.Dataset, times: xr.DataArray) -> xr.DataArray:
    """The divergence of each token if HIDDEN_SECONDS of the recording are hidden around each time, in nats.

    times: seconds (step,), such as maps.step. Returns (token, step).
    """
    hidden = abs(maps.time - times) < HIDDEN_SECONDS / 2
    keep = torch.from_numpy(~hidden.transpose("step", "time").values).float()[..., None]
    keep = keep.expand(-1, -1, maps.sizes["mel"]).to(forced.features.device)

    def decode(states: torch.Tensor) -> torch.Tensor:
        return forced.model.decode(states, forced.decoder_inputs)[:, forced.rows]

    divergence = divergence_from(decode(forced.encode(forced.features))[0])
    inputs = (forced.model.mask_input(forced.features, part) for part in keep.split(forced.model.batch_size))
    found = torch.cat([divergence(decode(forced.model.encode(each))).cpu() for each in inputs])
    return xr.DataArray(found.T.numpy(), coords={"token": maps.token, "step": times}, dims=("token", "step"))


def effect(voice: Explained, row: int, seconds: float) -> float:
    """The divergence of a token, in nats, if HIDDEN_SECONDS of its recording are hidden around a time."""
    if voice.forced is None:
        found = voice.maps.divergence_when_hidden.sel(step=[seconds], method="nearest")
    else:
        found = divergence_when_hidden(voice.forced, voice.maps, xr.DataArray([seconds], dims="step"))
    return float(found[row, 0])


def peaks(maps: xr.Dataset) -> pd.DataFrame:
    """Where the attention and the input saliency of each token are highest, in seconds, normalised as for rho."""
    attention = normalised_attention(spoken_attention(maps))
    saliency = normalised_saliency(maps.input_saliency, maps.cross_attention)
    table = pd.DataFrame({"token": attention.token.values})
    for name, each in (("attention", attention), ("saliency", saliency)):
        table[name] = each.idxmax("step").values
    return table


@check
def check_unused_attention(answer, voice: Explained) -> tuple[bool, str, str]:
    """Measure whether a token attends to a time, given as (row, seconds), that it does not use: at most 0.1 nats."""
    row, seconds, token = _moment(answer, voice)
    attention = normalised_attention(spoken_attention(voice.maps))[row]
    lower = float((attention < attention.sel(step=seconds, method="nearest")).mean())
    found = effect(voice, row, seconds)
    measured = f"the attention of {token} is lower at {lower:.0%} of the other steps (95% is enough), and hiding "
    measured += f"{HIDDEN_SECONDS} s around {seconds:.2f} s changes its distribution by {found:.2f} nats (at most 0.1)."
    return lower >= 0.95 and found <= 0.1, measured, "Hint: compare the two times of each token, and listen to them."


@check
def check_used_sound(answer, voice: Explained) -> tuple[bool, str, str]:
    """Measure whether a token uses a time, given as (row, seconds), ten times as much as its highest attention."""
    row, seconds, token = _moment(answer, voice)
    looked, used = effect(voice, row, peaks(voice.maps).attention[row]), effect(voice, row, seconds)
    measured = f"hiding {HIDDEN_SECONDS} s around {seconds:.2f} s changes the distribution of {token} by {used:.2f} "
    measured += f"nats (at least 1), and {looked:.2f} nats where its attention is highest (at most a tenth of that)."
    hint = "choose a token that attends to a pause." if used >= 1 else "listen for the sound that becomes the token."
    return used >= 1 and looked <= used / 10, measured, f"Hint: {hint}"


@check
def check_attention_wrong(answer, voice: Explained) -> tuple[bool, str, str]:
    """Measure whether the highest attention of a token, given by its row, misses what it uses: at most half of it."""
    token, looked, used = _effects_at_peaks(answer, voice)
    measured = f"for {token}, hiding {HIDDEN_SECONDS} s costs {looked:.2f} nats where attention is highest, and "
    measured += f"{used:.2f} nats where saliency is (at least 0.5 nats, and twice as much)."
    return used >= max(0.5, 2 * looked), measured, "Hint: start with the tokens whose two times differ most."


@check
def check_attention_right(answer, voice: Explained) -> tuple[bool, str, str]:
    """Measure whether the highest attention of a token, given by its row, is where it uses sound: at least 1 nat."""
    token, looked, used = _effects_at_peaks(answer, voice)
    measured = f"for {token}, hiding {HIDDEN_SECONDS} s costs {looked:.2f} nats where attention is highest, and "
    measured += f"{used:.2f} nats where saliency is (at least 1 nat, and 80 % as much)."
    return looked >= max(1, 0.8 * used), measured, "Hint: choose a long word whose two times agree."


def _moment(answer, voice: Explained) -> tuple[int, float, str]:
    """The row, the time and the token of an answer (row, seconds)."""
    tokens, end = peaks(voice.maps).token, float(voice.maps.step_end[-1])
    wanted = f"(row, seconds) with a row from 0 to {len(tokens) - 1} and a time from 0 to {end:.2f} s"
    row, seconds = numbers_of(answer, wanted, (0, len(tokens) - 1), (0, end))
    row = whole(row, wanted)
    return row, seconds, tokens[row]


def _effects_at_peaks(answer, voice: Explained) -> tuple[str, float, float]:
    """The token of a row, and its `effect` where its attention and where its saliency is highest."""
    table = peaks(voice.maps)
    wanted = f"a row from 0 to {len(table) - 1}"
    (row,) = numbers_of(answer, wanted, (0, len(table) - 1))
    found = table.loc[whole(row, wanted)]
    return found.token, *(effect(voice, int(row), time) for time in (found.attention, found.saliency))


# Lesson 4: reliability


def first_look(model: S2TModel, utterance: Utterance, kind: str, masks: int, seed: int = 0) -> xr.Dataset:
    """Explain an utterance with few masks of the input, and hardly any of the encoder's output."""
    occlusion = Occlusion(masks, 30, seed=seed, partition=kind, reliability=1.0)
    return explain(model, utterance, occlusion=occlusion, progress=False)


def looks_figure(looks: Sequence[xr.Dataset], words: Sequence[Word] = ()) -> Figure:
    """Draw the input saliency of the same utterance after several first looks."""
    drawn = {}
    for maps in looks:
        title = f"{maps.sizes['input_mask']} masks of {maps.partition}: reliability {maps.input_reliability:.2f}"
        drawn[title] = normalised_saliency(maps.input_saliency, maps.cross_attention)
    return panels(drawn, words)


@check
def check_reliable(answer, model: S2TModel, utterance: Utterance) -> tuple[bool, str, str]:
    """Measure the reliability of a map, given as (kind, masks): at least 0.7 with at most 120 masks."""
    kind, masks = answer if isinstance(answer, tuple | list) and len(answer) == 2 else ("", answer)
    wanted = f"(kind, masks) with a kind of {', '.join(PARTITIONS)} and 6 to 120 masks"
    if kind not in PARTITIONS:
        raise CannotMeasure(f"give {wanted}.")
    (masks,) = numbers_of(masks, wanted, (6, 120))
    masks = whole(masks, wanted)
    found = first_look(model, utterance, kind, masks).input_reliability
    measured = f"{masks} masks of {kind} give a map with a reliability of {found:.2f}; 0.7 is enough."
    return found >= 0.7, measured, "Hint: with fewer units, each is hidden with more different others."


@check
def check_prediction(answer, model: S2TModel, utterance: Utterance) -> tuple[bool, str, str]:
    """Measure how two maps from 60 other masks of windows each agree, and compare: within 0.1."""
    (guess,) = numbers_of(answer, "a correlation from -1 to 1", (-1, 1))
    pair = [first_look(model, utterance, "windows", 60, seed) for seed in (1, 2)]
    maps = [normalised_saliency(each.input_saliency, each.cross_attention).values.ravel() for each in pair]
    found = float(np.corrcoef(*maps)[0, 1])
    measured = f"two maps from other masks correlate at {found:.2f}, and your answer is {guess:.2f}."
    return abs(guess - found) <= 0.1, measured, "Hint: this is what the reliability of one map predicts."


# Lesson 5: choosing a head


def halves(rho: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Means of rho (utterance, ...) over the first and the second half of the utterances."""
    middle = rho.sizes["utterance"] // 2
    return rho[:middle].mean("utterance"), rho[middle:].mean("utterance")


def halves_figure(rho: xr.DataArray) -> Figure:
    """Draw rho of every head on the second half against that on the first, and mark the winner of the first."""
    first, second = halves(rho)
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(3.6, 3.4), layout="constrained")
        axes = figure.subplots()
        ends = float(min(first.min(), second.min())), float(max(first.max(), second.max()))
        axes.plot(ends, ends, color="0.7", linewidth=0.8)
        axes.scatter(first.values, second.values, s=14, color="#1f5a8c")
        axes.scatter(first.max(), second.sel(_best(first)), s=60, facecolors="none", edgecolors="#b5502d")
        axes.set(xlabel="rho on the first half", ylabel="rho on the second half", title="One point for each head")
    return figure


def _best(rho: xr.DataArray) -> dict[str, int]:
    """The layer and the head of the highest rho, as labels."""
    layer, head = np.unravel_index(rho.values.argmax(), rho.shape)
    return {"layer": rho.layer.values[layer], "head": rho["head"].values[head]}


@check
def check_winner(answer, rho: xr.DataArray) -> tuple[bool, str, str]:
    """Measure the rho of a head, given as (layer, head), on both halves: the best one of the first half passes."""
    layers, heads = rho.sizes["layer"], rho.sizes["head"]
    wanted = f"(layer, head) with a layer from 1 to {layers} and a head from 1 to {heads}"
    layer, head = numbers_of(answer, wanted, (1, layers), (1, heads))
    first, second = (float(half.sel(layer=int(layer), head=int(head))) for half in halves(rho))
    best = float(halves(rho)[0].max())
    measured = f"rho is {first:.3f} on the first half, where the best head has {best:.3f}, and {second:.3f} on the "
    measured += "second (over random halves, the best head falls from {:.3f} to {:.3f}).".format(*_fall(rho))
    return first >= best - 5e-4, measured, "Hint: look for the highest number of the first half only."


def _fall(rho: xr.DataArray, draws: int = 200) -> np.ndarray:
    """Mean rho of the best head of one half, there and on the other half, over random halves."""
    rng, values = np.random.default_rng(0), rho.values.reshape(rho.sizes["utterance"], -1)
    found = []
    for _ in range(draws):
        first, second = (half.mean(axis=0) for half in np.array_split(rng.permutation(values), 2))
        found.append((first.max(), second[first.argmax()]))
    return np.mean(found, axis=0)


@check
def check_expected(answer, rho: xr.DataArray) -> tuple[bool, str, str]:
    """Measure the rho that the winner of one utterance has on the others, on average, and compare: within 0.02."""
    (guess,) = numbers_of(answer, "a rho from -1 to 1", (-1, 1))
    own, others = [], []
    for number in range(rho.sizes["utterance"]):
        winner = _best(rho[number])
        own.append(float(rho[number].sel(winner)))
        others.append(float(rho.drop_isel(utterance=number).sel(winner).mean()))
    measured = f"the winner of one utterance has a rho of {np.mean(own):.3f} there and of {np.mean(others):.3f} on the "
    measured += f"others, and your answer is {guess:.3f}."
    return abs(guess - np.mean(others)) <= 0.02, measured, "Hint: leave out the utterance that chose the head."


@check
def check_layers(answer, stored: Sequence[xr.Dataset], rho: xr.DataArray) -> tuple[bool, str, str]:
    """Measure the rho of attention averaged over layers, on the second half: 0.05 above the winner of the first."""
    known = rho.layer.values.tolist()
    if not isinstance(answer, tuple | list) or not answer or any(layer not in known for layer in answer):
        raise CannotMeasure(f"give a list of layers from 1 to {len(known)}.")
    first, second = halves(rho)
    winner = float(second.sel(_best(first)))
    later = stored[len(stored) // 2 :]
    found = np.mean(
        [correlate(each.cross_attention.sel(layer=[*answer]), each.input_saliency).overall for each in later]
    )
    measured = f"all heads of your layers together have a rho of {found:.3f} on the second half, and the single head "
    measured += f"that won the first has {winner:.3f} (0.05 more is enough)."
    hint = "Hint: single heads are noisy, and noise averages out over heads and layers."
    return found >= winner + 0.05, measured, hint


# Lesson 6: deletion


def by_attention(maps: xr.Dataset) -> np.ndarray:
    """Attention averaged over tokens, layers and heads, on cells: (time, mel)."""
    return sentence_maps(maps, ["CA"])["CA"]


def deletion_curve(
    rank: Callable[[xr.Dataset], np.ndarray], model: S2TModel, stored: Sequence[xr.Dataset]
) -> pd.Series:
    """The mean log-probability of the words as cells are deleted, relative to the whole input, by percentage.

    rank: takes maps and returns the importance of each cell, (time, mel); the most important cells are deleted first.
    """
    curves = []
    for maps in stored:
        forced = Forced.of(model, maps)
        wanted = "a function that returns an array (time, mel)"
        scores = result_of(rank, maps.copy(deep=True), maps.features.shape, wanted)
        inputs = masked_inputs(torch.ones_like(forced.features), ranking(scores), step=STEP)
        values = values_without(forced, inputs)
        curves.append((values - values[0]).mean(axis=1))
    return pd.Series(np.mean(curves, axis=0), index=pd.Index(percentages(STEP), name="deleted cells (%)"))


@check
def check_ranking(answer, model: S2TModel, stored: Sequence[xr.Dataset]) -> tuple[bool, str, str]:
    """Measure the deletion of a ranking, a function of maps: its area has to be below that of attention."""
    return _against_attention(answer, model, stored)


@check
def check_ranking_without_model(answer, model: S2TModel, stored: Sequence[xr.Dataset]) -> tuple[bool, str, str]:
    """Measure the deletion of a ranking that gets the spectrogram alone: its area has to be below that of attention."""
    rank = (lambda maps: answer(maps.features)) if callable(answer) else answer
    return _against_attention(rank, model, stored)


def _against_attention(rank, model: S2TModel, stored: Sequence[xr.Dataset]) -> tuple[bool, str, str]:
    yours, attention = (
        area(deletion_curve(each, model, stored).values, percentages(STEP)) for each in (rank, by_attention)
    )
    measured = f"the area under the curve is {yours:.2f} nats with your ranking and {attention:.2f} with attention."
    return yours < attention, measured, "Hint: the sooner a ranking breaks the words, the more negative the area."


# Lesson 7: half of what?


def scatter_figure(maps: xr.Dataset) -> Figure:
    """Draw SM^H of one utterance against CA, one point for each token and step, as they are compared."""
    attention, saliency = (
        normalised_attention(spoken_attention(maps)).values.ravel(),
        normalised_saliency(maps.encoder_saliency, maps).values.ravel(),
    )
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(3.6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.scatter(attention, saliency, s=3, alpha=0.4, color="#1f5a8c")
        ends = np.array([attention.min(), attention.max()])
        axes.plot(ends, np.polyval(np.polyfit(attention, saliency, 1), ends), color="#b5502d")
        axes.set(xlabel="attention, standardised", ylabel="saliency, standardised", title=literal(maps.utterance))
    return figure


@check
def check_variance(answer, stored: Sequence[xr.Dataset]) -> tuple[bool, str, str]:
    """Measure the share of the variance of SM^H that a straight line in CA explains, and compare: within 0.02."""
    (guess,) = numbers_of(answer, "a share from 0 to 1", (0, 1))
    shares = []
    for maps in stored:
        attention = normalised_attention(spoken_attention(maps)).values.ravel()
        saliency = normalised_saliency(maps.encoder_saliency, maps).values.ravel()
        residual = saliency - np.polyval(np.polyfit(attention, saliency, 1), attention)
        shares.append(1 - residual.var() / saliency.var())
    measured = f"a straight line explains {np.mean(shares):.1%} of the variance, and your answer is {guess:.1%}."
    return abs(guess - np.mean(shares)) <= 0.02, measured, "Hint: for a straight line, this is the square of rho."


@check
def check_without_noise(answer, rho: xr.Dataset) -> tuple[bool, str, str]:
    """Estimate rho(CA, SM^H) at infinitely many masks, and compare: within 0.03. rho: from `correlate_all`."""
    (guess,) = numbers_of(answer, "a rho from -1 to 1", (-1, 1))
    found = float(converged(rho).overall.sel(saliency="encoder").mean())
    measured = f"all masks and half of them give a rho of {found:.3f} without noise; your answer is {guess:.3f}."
    return abs(guess - found) <= 0.03, measured, "Hint: divide by the square root of the reliability."


@check
def check_interval(answer, rho: xr.DataArray) -> tuple[bool, str, str]:
    """Measure whether an interval (low, high) of at most 0.25 holds the mean rho of the utterances 2, 4, and so on.

    rho: (utterance,).
    """
    low, high = numbers_of(answer, "(low, high), two numbers from -1 to 1", (-1, 1), (-1, 1))
    found = float(rho[1::2].mean())
    measured = f"the mean of the utterances that you did not use is {found:.3f}, and your interval is {low:.3f} to "
    measured += f"{high:.3f}, {high - low:.3f} wide (at most 0.25)."
    hint = "Hint: take 2 standard errors on each side of the mean, or 3 if there are few utterances."
    return low <= found <= high <= low + 0.25, measured, hint
