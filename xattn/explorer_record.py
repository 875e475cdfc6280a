"""What the page of `xattn.explore` shows of one dataset: arrays in few bits, packed and compressed."""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from itertools import count
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.colors import Normalize

from xattn.analysis.correlation import correlate, normalised_attention
from xattn.analysis.faithfulness import BLANK, VERSION, load_texts, percentages, ranking, sentence_maps
from xattn.analysis.localisation import PUNCTUATION, token_kinds
from xattn.analysis.quality import normalise
from xattn.analysis.reliability import LOW
from xattn.audio import FRAME_SECONDS
from xattn.figures import SPECTROGRAM
from xattn.files import hash_value
from xattn.maps import SPECIAL_TOKENS, drop_special_tokens, on_steps, selected_word_numbers, spelled

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
CONTRAST = -1.5, 3  # standard deviations of the features where the colours of the spectrogram end
ALL = "all"  # label of the average of layers or heads


def record(maps: xr.Dataset, deletions: str | PathLike | None, chunks: dict[str, str]) -> bytes:
    """Everything that the page shows of one dataset, packed.

    deletions: see `xattn.explore`; chunks: of the page, to which arrays are added that several records share.
    """
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
            "features": add_chunk(chunks, _features(maps)) if "features" in maps else None,
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
    return {"values": packed.add(levels), "which": add_chunk(chunks, content), **packed.add_all(scale)}


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


def add_chunk(chunks: dict[str, str], content: bytes) -> str:
    """Store content once among the chunks of the page, in base64; return its name."""
    name = f"chunk-{hashlib.sha256(content).hexdigest()[:16]}"
    chunks[name] = base64.b64encode(content).decode()
    return name
