"""`explore`: one HTML page on which maps are read and heard. It needs no network.

explorer.html is the page without its data, and explorer.js draws it.
"""

import base64
import hashlib
import html
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from itertools import chain, count
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import xarray as xr
from matplotlib.colors import Normalize
from tqdm import tqdm

from xattn.analysis.correlation import correlate, normalised_attention
from xattn.analysis.faithfulness import BLANK, VERSION, load_texts, percentages, ranking, sentence_maps
from xattn.analysis.localisation import PUNCTUATION, token_kinds
from xattn.analysis.quality import normalise
from xattn.analysis.reliability import LOW
from xattn.audio import FRAME_SECONDS, SAMPLE_RATE, Recording
from xattn.data.utterance import Utterance, utterance_from_recording
from xattn.figures import MAP_COLOURS, SPECTROGRAM, STYLE, heatmaps
from xattn.files import hash_value, write_whole
from xattn.maps import SPECIAL_TOKENS, drop_special_tokens, on_steps, selected_word_numbers, spelled
from xattn.store import INDEX, load_maps

TITLES = {
    "cross_attention": "Cross-attention (CA), weights",
    "input_saliency": "Input saliency (SM^X)",
    "encoder_saliency": "Encoder saliency (SM^H)",
}
ROWS = {"token", "step"}, {"token", "time"}  # axes of the attributions that the page draws, besides layer and head
LEVELS = 128  # of quantised values
SHADES = 32  # least number of levels in a row of a head and in the cells of a token; more make pages too large
TINY = 1e-30
HEARD = 0.5  # share of a token's map that its stretch holds
SHORTEST = 0.2  # seconds; shorter sounds are clicks
DELETED_BY = ("CA", "SM^X", "SM^H")
STEPS = [step for step in range(1, 101) if 100 % step == 0]  # of deletion curves
COMPRESSION = 0.9  # of Opus: about 30 kbit/s
RHO_COLOURS = "cividis"
CONTRAST = -1.5, 3  # standard deviations of the features where the colours of the spectrogram end
NO_SOUND = "There is no sound for this utterance: give its recording as audio=."
ALL = "all"  # label of the average of layers or heads
TOLERANCE = 0.1  # seconds by which maps may reach beyond the sound

FRAME = (
    '<div data-lm-suppress-shortcuts="true"><iframe title="xattn explorer" data-lm-suppress-shortcuts="true" '
    'style="width:100%;height:85vh;min-height:640px;border:0;resize:vertical" srcdoc="{page}"></iframe>'
    '<img alt="Heatmaps of the first maps" src="data:image/png;base64,{picture}"></div>'
)


@dataclass(frozen=True)
class Explorer:
    """A page made by `explore`. As the last line of a notebook's cell it is shown there, offline.

    document: the HTML. first: the maps that the page opens with. In a notebook that is not trusted, JupyterLab removes
    the page; a picture of these maps is left. Otherwise the page removes the picture.
    """

    document: str = field(repr=False)
    first: xr.Dataset = field(repr=False)

    def page(self) -> str:
        """Return the whole HTML document, which refers to nothing outside itself."""
        return self.document

    def save(self, path: str | PathLike) -> None:
        """Write the page to a file that any browser opens. OSError: it could not be written."""
        write_whole(Path(path), self.document.encode())

    def _repr_html_(self) -> str:
        return self._repr_mimebundle_()["text/html"]

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        file = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            heatmaps(self.first).savefig(file, format="png", bbox_inches="tight", dpi="figure")
        picture = base64.b64encode(file.getvalue()).decode()
        shown = FRAME.format(page=html.escape(self.document), picture=picture)
        return {"text/html": shown, "image/png": picture, "text/plain": repr(self)}


def explore(
    maps: xr.Dataset | Iterable[xr.Dataset] | str | PathLike,
    audio: Recording | Utterance | Sequence[Utterance] | None = None,
    *,
    deletions: str | PathLike | None = None,
) -> Explorer:
    """Make one HTML page that shows and plays maps.

    The page shows the model's features above an attribution, tokens against time. Any variable of the maps with the
    axes token and step, or token and time, is an attribution: add your own with `maps.assign(name=array)`. Each row is
    coloured from its lowest to its highest value. A variable (token, time, mel) is reduced to encoder steps by the
    maximum, as for the correlation, and the cells of the selected token are shown, too.

    The page opens with CA standardised over tokens, as in `xattn.figures.heatmaps`: averaged over layers and heads, and
    without special tokens, whose rows are 0. The attention weights show every layer and head.

    Clicking a token plays its stretch: the shortest one, of at least 0.2 s, that holds half of its row. What counts is
    the part of each value above the row's mean, because saliency is rarely 0. The stretch of a word is that of the mean
    row of its tokens, without punctuation.

    Values are stored in 8 bits. A value read on the page is off by at most 1/255 of the range of its attribution.

    Args:
        maps: from `xattn.explain`; several, as from `xattn.load_maps`; or a folder of `xattn.explain_corpus`, of which
            all finished runs are shown. Selections of layers, heads, tokens or a stretch of time work.
        audio: where the sound is: a recording as for `xattn.explain`, an Utterance, or the utterances of a corpus
            (`xattn.load_corpus`), which are found by their ids. By default the recording that `xattn.explain` read, if
            it is still there. Without sound, the page says so and shows everything else.
        deletions: the folder of the texts that `deletion_curves` stored; by default `deletion` in the folder of maps.

    Returns:
        An Explorer, which JupyterLab shows; `.save("explorer.html")` writes the page.

    Raises:
        ValueError: there are no maps, a dataset is not maps, the audio is not what the maps explain, or a list of
            utterances holds none of those that the maps explain.
        FileNotFoundError: a folder or the recording does not exist.
        OSError, TypeError: see `xattn.audio.load_audio`.
    """
    if isinstance(maps, str | PathLike) and deletions is None and (Path(maps) / "deletion").is_dir():
        deletions = Path(maps) / "deletion"
    if deletions is not None and not Path(deletions).is_dir():
        raise FileNotFoundError(f"{deletions} is no folder: give the folder that deletion_curves wrote as deletions=.")
    sounds, utterances, chunks, first = _sounds(audio), {}, {}, None
    for each in tqdm(_datasets(maps), desc="explorer", unit=" maps", delay=3, file=sys.stdout):
        each = _checked(each)
        first = each if first is None else first
        key = each.utterance, each.attrs.get("audio")
        if key not in utterances:
            if utterances and isinstance(sounds, Utterance):
                raise ValueError(
                    "audio is one recording, but the maps explain several utterances: give a list of utterances, such "
                    "as xattn.load_corpus(...)."
                )
            utterances[key] = _entry(each, sounds, chunks)
        records = utterances[key]["records"]
        records.append(_condition(each, records) | {"chunk": _add(chunks, _record(each, deletions, chunks))})
    if first is None:
        raise ValueError("There are no maps to explore: give a dataset of xattn.explain, or a folder of maps.")
    if isinstance(sounds, dict) and not any(id in sounds for id, _ in utterances):
        raise ValueError(
            f"audio holds no utterance {first.utterance}, nor any other that the maps explain: give the utterances of "
            "their corpus and split."
        )
    return Explorer(_document(list(utterances.values()), chunks), first)


def _datasets(maps: xr.Dataset | Iterable[xr.Dataset] | str | PathLike) -> Iterable[xr.Dataset]:
    """The datasets that `maps` stands for. FileNotFoundError, TypeError, ValueError: it stands for none."""
    if isinstance(maps, xr.Dataset):
        return [maps]
    if isinstance(maps, str | PathLike):
        folder = Path(maps)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: give the folder that xattn.explain_corpus wrote.")
        runs = sorted(path.relative_to(folder).parts[:2] for path in folder.glob(f"*/*/{INDEX}"))
        if not runs:
            for levels, pattern in enumerate((f"*/{INDEX}", INDEX)):
                if any(folder.glob(pattern)):
                    whole = folder.resolve().parents[levels]
                    raise ValueError(f"{folder} holds only a part of the maps: give {whole}.")
            raise ValueError(f"{folder} holds no finished run of xattn.explain_corpus: make maps first.")
        return chain.from_iterable(load_maps(folder, *run) for run in runs)
    if isinstance(maps, Iterable) and not isinstance(maps, xr.DataArray | np.ndarray):
        return maps
    raise TypeError(f"maps is of type {type(maps).__name__}: give a dataset of xattn.explain, several, or a folder.")


def _checked(maps: xr.Dataset) -> xr.Dataset:
    """Maps with the axis token, which a selection of one token lacks. TypeError, ValueError: they are no maps."""
    if not isinstance(maps, xr.Dataset):
        raise TypeError(f"maps holds an object of type {type(maps).__name__}: give datasets of xattn.explain.")
    missing = [name for name in ("cross_attention", "token", "time", "step_start") if name not in maps]
    missing += [name for name in ("model", "setting", "utterance") if name not in maps.attrs]
    if missing:
        raise ValueError(f"The dataset has no {', '.join(missing)}, so it holds no maps: give one of xattn.explain.")
    banded = [maps[name] for name in ("features", "input_saliency") if name in maps]
    lost = [axis for axis in ("time", "step") if axis not in maps.dims]
    lost += ["mel"] * any("mel" not in array.dims for array in banded)
    if lost:
        raise ValueError(f"The maps of {maps.utterance} have lost their axis {lost[0]}: select with a list or slice.")
    for axis in ("token", "time", "step", *["mel"] * bool(banded)):
        if not maps[axis].size:
            raise ValueError(f"The maps of {maps.utterance} have no {axis} left: select at least one.")
    for axis in ("time", "step"):
        if (np.diff(maps[axis].values) <= 0).any():
            raise ValueError(
                f'The axis {axis} of the maps of {maps.utterance} does not ascend: sort it with maps.sortby("{axis}").'
            )
    if "token" not in maps.dims:
        features = {name: maps[name] for name in ("features",) if name in maps}
        words = {"word": ("token", np.atleast_1d(maps.word.values))} if "word" in maps.coords else {}
        maps = maps.expand_dims("token").assign(features).assign_coords(words)
    return maps


# Sound


def _sounds(audio: Recording | Utterance | Sequence[Utterance] | None) -> Utterance | dict[str, Utterance] | None:
    """One recording, or the utterances of a corpus by their ids."""
    if audio is None or isinstance(audio, Utterance):
        return audio
    if isinstance(audio, list | tuple) and audio and isinstance(audio[0], Utterance):
        return {each.id: each for each in audio}
    return utterance_from_recording(audio)


def _entry(maps: xr.Dataset, sounds: Utterance | dict[str, Utterance] | None, chunks: dict[str, str]) -> dict:
    """An utterance of the page's index: its sound and, later, its records."""
    entry = {"id": maps.utterance, "sound": None, "start": 0.0, "message": NO_SOUND, "records": []}
    utterance = sounds.get(maps.utterance) if isinstance(sounds, dict) else sounds
    if utterance is None and sounds is None and "recording" in maps.attrs:
        try:
            utterance = utterance_from_recording(maps.recording)
            samples = _samples(utterance, maps)
        except (OSError, ValueError):
            entry["message"] = f"{maps.recording} is not there or has changed: give the recording as audio=."
            return entry
    elif utterance is not None:
        samples = _samples(utterance, maps)
    else:
        if sounds is not None:
            entry["message"] = f"There is no sound, because audio holds no utterance {maps.utterance}."
        return entry
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
    start = utterance.start if utterance.end is not None else 0.0
    return entry | {"sound": _add(chunks, file.getvalue()), "start": start, "message": ""}


def _samples(utterance: Utterance, maps: xr.Dataset) -> np.ndarray:
    """The samples of an utterance. ValueError: they are not what the maps explain."""
    samples = utterance.audio()
    start = utterance.start if utterance.end is not None else 0.0
    # The kit hashes samples as float32; maps of other tools have no hash.
    other = not hashlib.sha256(samples.tobytes()).hexdigest().startswith(maps.attrs.get("audio", ""))
    beyond = not start - TOLERANCE <= maps.time[-1] <= start + len(samples) / SAMPLE_RATE + TOLERANCE
    if other or beyond:
        raise ValueError(
            f"The audio {utterance.audio_path or utterance.id} is not what the maps of {maps.utterance} explain: give "
            "their recording or, for a part of one, its Utterance."
        )
    return samples


# One dataset


def _condition(maps: xr.Dataset, others: list[dict]) -> dict:
    """The name of the maps in the page's picker, with a number if others of the utterance have the same name."""
    name = f"{maps.model}, {maps.setting}{', given text' * bool(maps.attrs.get('forced'))}"
    same = sum(other["name"] == name for other in others)
    return {"name": name, "label": f"{name} ({same + 1})" if same else name}


def _record(maps: xr.Dataset, deletions: str | PathLike | None, chunks: dict[str, str]) -> bytes:
    """Everything that the page shows of one dataset, packed."""
    packed, language = Packed(), maps.setting.split("-")[-1]
    tokens = maps.token.values.tolist()
    numbers = selected_word_numbers(maps) if "word" in maps.coords else np.arange(len(tokens))
    groups = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    words = [spelled([tokens[i] for i in group]) for group in groups]
    kinds = token_kinds(tokens)
    content = [rows if (rows := group[kinds[group] != PUNCTUATION]).size else group for group in groups]
    several, further = [rows for rows in content if len(rows) > 1], count(len(tokens))
    spoken = [row for row, group in enumerate(groups) if tokens[group[0]] not in SPECIAL_TOKENS]
    reference = maps.attrs.get("reference", "")
    complete = _letters("".join(words[row] for row in spoken)) == _letters(maps.attrs.get("hypothesis", ""))
    signs, notes, deleted, changes = [""] * len(words), [], [], []
    if reference and not complete:
        notes.append("These tokens are not the whole hypothesis, so they are not compared with the reference.")
    elif reference:
        changes = differences(reference.split(), [words[row] for row in spoken], language)
        for row, sign in zip(spoken, (sign for sign, _ in changes if sign != "-"), strict=True):
            signs[row] = sign
    if deletions is not None and not (complete and _is_whole(maps)):
        notes.append("Stored deletions are not shown, because these maps are a selection.")
    elif deletions is not None:
        deleted = [each | {"rank": packed.add(each["rank"])} for each in _deletions(maps, Path(deletions), language)]
    start, hop = _frames(maps)
    return packed.bytes(
        {
            "tokens": tokens,
            "words": [
                {
                    "text": word,
                    "differs": sign == "+",
                    "tokens": group.tolist(),
                    "content": rows.tolist(),
                    "stretch": next(further) if len(rows) > 1 else int(rows[0]),
                }
                for word, sign, group, rows in zip(words, signs, groups, content, strict=True)
            ],
            "reference": [change for change in changes if change[0] != "+"],
            "notes": notes,
            "span": [start, start + hop * maps.sizes["time"]],
            "features": _add(chunks, _features(maps)) if "features" in maps else None,
            "attributions": [
                *_standardised_attention(maps, several, packed),
                *(_attribution(maps, name, several, packed, chunks) for name in _attributions(maps)),
            ],
            "deletions": deleted,
        }
    )


def _is_whole(maps: xr.Dataset) -> bool:
    """Whether no layer, head or frame was left out."""
    axes = [axis for axis in ("layer", "head", "time") if axis in maps.dims]
    return len(axes) == 3 and all(maps.sizes[axis] == maps[axis].attrs.get("total", maps.sizes[axis]) for axis in axes)


def _letters(text: str) -> str:
    """A text without white space and without the signs of unknown tokens, which tokenisers write differently."""
    return "".join(text.replace("<unk>", "").replace("⁇", "").split())


def differences(before: Sequence[str], after: Sequence[str], language: str) -> list[tuple[str, str]]:
    """Align two lists of words: (sign, word) in order, "+" only in the second, "-" only in the first, "" in both.

    Case and punctuation do not count, as in the WER. Words in both are spelled as in the second.
    """
    keys = [[_key(word, language) for word in words] for words in (before, after)]
    found = []
    for kind, a, b, c, d in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if kind != "equal":
            found += [("-", word) for word in before[a:b]]
        found += [("" if kind == "equal" else "+", word) for word in after[c:d]]
    return found


@cache
def _key(word: str, language: str) -> str:
    return normalise(word, language) or word


def _frames(maps: xr.Dataset | xr.DataArray) -> tuple[float, float]:
    """The start of the first frame and the distance between frames, in seconds."""
    times = maps.time.values
    hop = times[1] - times[0] if len(times) > 1 else FRAME_SECONDS
    return float(times[0] - hop / 2), float(hop)


def _features(maps: xr.Dataset) -> bytes:
    """The model's features, packed; the records of an utterance share them."""
    packed, features = Packed(), maps.features.transpose("time", "mel").values
    bands = maps.mel.values.tolist() if "mel" in maps.coords else None
    levels, scale = quantised(features.reshape(1, -1))
    low, high = float(scale["low"][0]), float(scale["high"][0])
    shown = Normalize(*(features.mean() + features.std() * np.array(CONTRAST)), clip=True)
    colours = matplotlib.colormaps[SPECTROGRAM["cmap"]](shown(np.linspace(low, high, LEVELS + 1)), bytes=True)
    return packed.bytes(
        {
            "values": packed.add(levels.reshape(features.shape)),
            "low": low,
            "high": high,
            "bands": bands,
            "colours": colours[:, :3].tolist(),
        }
    )


def _attributions(maps: xr.Dataset) -> list[str]:
    """The variables that the page can draw on its time axis, those of the paper first."""
    drawn = [
        name
        for name, variable in maps.data_vars.items()
        if set(variable.dims) - {"layer", "head"} in ROWS or set(variable.dims) == {"token", "time", "mel"}
    ]
    return sorted(drawn, key=lambda name: [*TITLES, name].index(name))


def _standardised_attention(maps: xr.Dataset, words: list[np.ndarray], packed: "Packed") -> list[dict]:
    """CA as `figures.heatmaps` draws it, averaged and standardised over tokens; nothing for fewer than two tokens.

    Only the average is stored, as every layer and head would double the size of the page. Rows of special tokens are 0.
    """
    spoken = ~np.isin(maps.token.values, SPECIAL_TOKENS)
    if spoken.sum() < 2:
        return []
    kept = [name for name in ("cross_attention", "padding_attention") if name in maps]
    averaged = maps.assign({name: _by_head(maps[name]).mean("head").mean("layer") for name in kept})
    attention = averaged.cross_attention
    values = np.zeros((1, 1, *attention.shape))
    values[0, 0, spoken] = normalised_attention(attention).values
    facts = ["Each step is standardised over the tokens, as for rho."]
    if not spoken.all():
        facts.append("Special tokens such as </s> are left out, so their rows are empty.")
    if maps.cross_attention.size > attention.size:
        facts.append("Choose a head in the table to see its weights.")
    return [
        {
            "name": "standardised_attention",
            "title": "Cross-attention (CA), standardised over tokens",
            "unit": "standard deviations",
            "facts": facts,
            "layers": _labels(maps.cross_attention, "layer")[-1:],
            "heads": _labels(maps.cross_attention, "head")[-1:],
            "cells": None,
            **_rows(values, *_columns(attention), words, SHADES, packed),
            **_about_heads(averaged, "cross_attention", packed),
        }
    ]


def _attribution(
    maps: xr.Dataset, name: str, words: list[np.ndarray], packed: "Packed", chunks: dict[str, str]
) -> dict:
    """One attribution: its rows for every layer, head and average, their stretches, and what is known about it."""
    array, cells = maps[name], None
    if not np.isfinite(array.values).all():
        raise ValueError(f"{name} of {maps.utterance} holds values that are not finite: leave it out, or fill them.")
    heads = bool({"layer", "head"} & set(array.dims)) or name == "cross_attention"
    if "mel" in array.dims:
        if (array != array.isel(mel=0)).any():  # without bands, the rows show everything
            cells = _cells(array.transpose("token", "time", "mel").values, packed, chunks)
        array = on_steps(array, maps)
    values = _by_head(array).values.astype(np.float64)
    if heads:
        values = with_averages(values)
    return {
        "name": name,
        "title": TITLES.get(name, name.replace("_", " ")),
        "unit": _unit(maps, name),
        "facts": _facts(maps, name),
        "layers": _labels(array, "layer") if heads else [],
        "heads": _labels(array, "head") if heads else [],
        "cells": cells,
        **_rows(values, *_columns(array), words, SHADES if heads else LEVELS, packed),
        **(_about_heads(maps, name, packed) if heads else {}),
    }


def _rows(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray, words: list[np.ndarray], least: int, packed: "Packed"
) -> dict:
    """Values (layer, head, token, columns), quantised, and their stretches: those of tokens, then those of words.

    A stretch is stored as its first column and the number of columns after it.

    words: for each word of several tokens, the tokens whose mean has its stretch.
    """
    levels, scale = quantised(values, least)
    means = [values[:, :, rows].mean(axis=2) for rows in words]
    found = stretches(np.stack([*np.moveaxis(values, 2, 0), *means], axis=2), starts, ends)
    found[..., 1] -= found[..., 0]  # lengths compress better than ends
    return {
        "values": packed.add(levels),
        **packed.add_all(scale),
        "starts": packed.add(starts),
        "ends": packed.add(ends),
        "stretches": packed.add(found.astype(np.min_scalar_type(len(ends)))),
    }


def _labels(array: xr.DataArray, axis: str) -> list[int | str]:
    """The numbers of the layers or heads and "all" for their average; "" if the array has lost the axis."""
    if axis not in array.dims and axis not in array.coords:
        return [""]
    numbers = np.atleast_1d(array[axis].values).tolist()
    return numbers + [ALL] * (len(numbers) > 1)


def _by_head(array: xr.DataArray) -> xr.DataArray:
    """An array with the axes layer, head and token in front, of length 1 where it lacks them."""
    missing = [axis for axis in ("layer", "head", "token") if axis not in array.dims]
    return array.expand_dims(missing).transpose("layer", "head", "token", ...)


def _columns(array: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end in seconds of the steps or frames of an array."""
    if "step" in array.dims:
        return array.step_start.values, array.step_end.values
    start, hop = _frames(array)
    starts = start + hop * np.arange(array.sizes["time"])
    return starts, starts + hop


def with_averages(values: np.ndarray) -> np.ndarray:
    """Append averages to (layer, head, ...): the last layer is the average of the layers, the last head of the heads.

    Returns (layer + 1, head + 1, ...); an axis of length 1 stays as it is. Heads are averaged first, as for rho.
    """
    for axis in (1, 0):
        if values.shape[axis] > 1:
            values = np.concatenate([values, values.mean(axis=axis, keepdims=True)], axis=axis)
    return values


def _about_heads(maps: xr.Dataset, name: str, packed: "Packed") -> dict:
    """rho with SM^X and the share of attention on padding of every layer, head and average, where they are known."""
    found = {"rho": None, "padding": None, "silent": ""}
    if "input_saliency" not in maps:
        found["silent"] = "These maps have no SM^X to correlate with."
    else:
        try:
            rho = correlate(_by_head(maps[name]), maps.input_saliency)
            top = np.concatenate([rho.by_layer_and_head, rho.by_layer.values[:, None]], axis=1)
            bottom = np.append(rho.by_head, rho.overall)
            both = np.vstack([top, bottom]).astype(np.float32)
            rows, columns = (size + (size > 1) for size in rho.by_layer_and_head.shape)  # as in with_averages
            found["rho"] = packed.add(both[:rows, :columns])
        except ValueError as error:
            found["silent"] = f"rho is unknown: {error}"
    if name == "cross_attention" and "padding_attention" in maps:
        share = _by_head(drop_special_tokens(maps).padding_attention).mean("token")
        found["padding"] = packed.add(with_averages(share.values).astype(np.float32))
    return found


def _cells(cells: np.ndarray, packed: "Packed", chunks: dict[str, str]) -> dict:
    """Cells (token, time, mel), stored once for all cells that are the same for every token, as in a superpixel.

    which: the chunk with the number (time, mel) of each cell's stored value. Maps of other models with the same
    superpixels share it.
    """
    flat = cells.reshape(len(cells), -1)
    _, first, which = np.unique(flat, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.argsort(order)[which].reshape(cells.shape[1:])
    levels, scale = quantised(flat[:, first[order]], SHADES)
    shared = Packed()
    content = shared.bytes({"numbers": shared.add(numbers.astype(np.min_scalar_type(len(first))))})
    return {"values": packed.add(levels), "which": _add(chunks, content), **packed.add_all(scale)}


def _unit(maps: xr.Dataset, name: str) -> str:
    """The unit of a variable's values, or "" if it is unknown."""
    if name == "cross_attention":
        return "attention weight"
    if name in TITLES and "estimator" in maps.attrs:
        return "√nat" if maps.estimator.startswith("sqrt_") else "nat"
    return maps[name].attrs.get("units", "")


def _facts(maps: xr.Dataset, name: str) -> list[str]:
    """What the caption of a map says about its noise and its resolution."""
    place, facts = name.removesuffix("_saliency"), []
    reliability = maps.attrs.get(f"{place}_reliability", np.nan)
    if name in TITLES and name != "cross_attention":
        known = f"Reliability {reliability:.2f}{', mostly noise' if reliability < LOW else ''}."
        facts.append("Reliability unknown." if np.isnan(reliability) else known)
    if name == "input_saliency" and maps.attrs.get("partition") == "windows":
        facts.append("It comes from windows of time and says nothing about frequency.")
    return facts


def quantised(values: np.ndarray, least: int = LEVELS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Round every row (..., columns) to levels between its lowest and its highest value.

    A value is off by at most 1/255 of the range of all values. Rows whose own range is small get fewer levels, but at
    least `least`, which also is the number of their colours.

    Returns:
        The levels, uint8 (..., columns), and the scale of the rows (...): low, high (float32) and steps (uint8). A
        value is low + level / steps * (high - low).
    """
    low, high = values.min(axis=-1), values.max(axis=-1)
    constant = low == high
    grid = 2.0 ** np.floor(np.log2(np.where(constant, 1, high - low))) / 512  # ends on a coarse grid compress well
    low, high = (np.floor(low / grid) * grid).astype(np.float32), (np.ceil(high / grid) * grid).astype(np.float32)
    span = np.where(constant, 1, high.astype(float) - low)
    steps = np.clip(np.ceil(LEVELS * span / max(np.ptp(values), TINY)), least, LEVELS)
    share = np.where(constant[..., None], 0, (values - low[..., None]) / span[..., None])
    levels = np.round(share.clip(0, 1) * steps[..., None]).astype(np.uint8)
    return levels, {"low": low, "high": high, "steps": steps.astype(np.uint8)}


def stretches(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The shortest stretch of each row (..., columns) that holds half of it: its first and last column, (..., 2).

    What counts is the part of each value above the row's mean. A stretch lasts at least 0.2 s, if the columns do, and
    the earliest of equally short ones is returned. A constant row has the stretch of all columns.

    starts, ends: of the columns in seconds.
    """
    above = np.maximum(values - values.mean(axis=-1, keepdims=True), 0)
    totals = np.concatenate([np.zeros((*above.shape[:-1], 1)), above.cumsum(axis=-1)], axis=-1)
    slack = 1e-9 * (ends[-1] - starts[0])  # so that rounding neither lengthens a stretch nor decides between equal ones
    soonest = np.searchsorted(ends, starts + SHORTEST - slack)
    found = np.empty((*values.shape[:-1], 2), dtype=int)
    for row in np.ndindex(values.shape[:-1]):
        total = totals[row]
        needed = total[:-1] + HEARD * total[-1] * (1 - 1e-9)
        last = np.maximum(np.searchsorted(total, needed) - 1, soonest)
        first = np.flatnonzero(last < len(ends))
        if total[-1] == 0 or not len(first):
            found[row] = 0, len(ends) - 1
            continue
        lengths = ends[last[first]] - starts[first]
        best = first[np.argmax(lengths <= lengths.min() + slack)]
        found[row] = best, last[best]
    return found


def _deletions(maps: xr.Dataset, folder: Path, language: str) -> list[dict]:
    """The stored texts of the deletion curves of one utterance: for each map, what is written at each percentage.

    rank: (time, mel), the index of the percentage from which on a cell is deleted.
    """
    found, names = [], {"maps": maps.attrs.get("key"), "version": VERSION}
    stem = folder / maps.model / maps.setting / maps.utterance
    blank = load_texts(Path(f"{stem}-{BLANK}.json"), hash_value(names, 16))
    for kind in DELETED_BY if blank else ():
        path = Path(f"{stem}-deletion-{kind}.json")
        keys = {step: hash_value(names | {"insertion": False, "step": step}, 16) for step in STEPS}
        step, texts = next(((step, texts) for step in keys if (texts := load_texts(path, keys[step]))), (0, None))
        if texts is None:
            continue
        (sentence,) = sentence_maps(maps, [kind]).values()
        order, percent = ranking(sentence), percentages(step)
        rank = np.empty(len(order), dtype=np.uint8)
        for index in reversed(range(len(percent))):
            rank[order[len(order) - len(order) * int(percent[index]) // 100 :]] = index
        words = maps.hypothesis.split()
        found.append(
            {
                "kind": kind,
                "percent": percent.tolist(),
                "rank": rank.reshape(sentence.shape),
                "texts": [differences(words, text.split(), language) for text in [maps.hypothesis, *texts, *blank]],
            }
        )
    return found


# The document


class Packed:
    """Arrays behind a JSON header, compressed. In the header stands where each array lies, its type and its shape."""

    def __init__(self):
        self.arrays, self.places = bytearray(), {}

    def add(self, array: np.ndarray) -> dict:
        """Append an array, unless it is there already; return what stands for it in the header."""
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if content not in self.places:
            self.places[content] = len(self.arrays)
            self.arrays += content
        return {"at": self.places[content], "type": array.dtype.name, "shape": array.shape}

    def add_all(self, arrays: dict[str, np.ndarray]) -> dict[str, dict]:
        """`add` for several arrays."""
        return {name: self.add(array) for name, array in arrays.items()}

    def bytes(self, header: dict) -> bytes:
        """Return the length of the header (uint32), the header and the arrays, as a raw deflate stream."""
        text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
        # Values are noisy, so that short blocks of literals are smaller than long ones with matches.
        compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 7, zlib.Z_FILTERED)
        whole = len(text).to_bytes(4, "little") + text + self.arrays
        return compressor.compress(whole) + compressor.flush()


def _add(chunks: dict[str, str], content: bytes) -> str:
    """Store content once among the chunks of the page, in base64; return its name."""
    name = f"chunk-{hashlib.sha256(content).hexdigest()[:16]}"
    chunks[name] = base64.b64encode(content).decode()
    return name


def _document(utterances: list[dict], chunks: dict[str, str]) -> str:
    """The page with its data and its module."""
    names = {"map": MAP_COLOURS, "rho": RHO_COLOURS}
    colours = {
        use: matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3].tolist() for use, name in names.items()
    }
    index = json.dumps({"utterances": utterances, "colours": colours}, ensure_ascii=False)
    parts = {
        "index": index.replace("<", "\\u003c"),  # "</script>" in a name would end the data
        "chunks": "\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in chunks.items()),
        "module": _file("explorer.js"),
    }
    return re.sub(r"\$(index|chunks|module)", lambda found: parts[found[1]], _file("explorer.html"))


def _file(name: str) -> str:
    """A text file of this package."""
    return files("xattn").joinpath(name).read_text(encoding="utf-8")
