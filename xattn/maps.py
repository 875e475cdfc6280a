"""The dataset that holds the maps of one utterance: how it is built, and views of it.

Dimensions are layer, head, token, step (encoder step), time (input frame) and mel, in this order. `token` carries
subword strings, `word` the word that each token belongs to, `step` and `time` seconds, `mel` the centre of each band in
Hz. `step_start` and `step_end` are the seconds that each step covers; the first and last step can reach beyond the
recording. The attribute `total` of layer, head and time is their length before any selection.
"""

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr

from xattn.attribution.estimators import UnitScores, UnitWeights
from xattn.attribution.occlusion import Masks, Partition
from xattn.audio import FRAME_SECONDS, WINDOW_SECONDS

REDUCTIONS = ("2d_max", "2d_avg", "1d_max_1d_avg")
SPECIAL_TOKENS = ("</s>", "<s>", "<|endoftext|>")  # BOS and EOS; the last one is Whisper's
WORD_START = "▁"
BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")  # of characters that are split among tokens
SALIENCIES = ("input_saliency", "encoder_saliency")  # SM^X and SM^H
DIMENSIONS = {
    "cross_attention": ("layer", "head", "token", "step"),
    "padding_attention": ("layer", "head", "token"),
    "input_saliency": ("token", "time", "mel"),
    "encoder_saliency": ("token", "step"),
    "input_halves": ("half", "token", "step"),
    "encoder_halves": ("half", "token", "step"),
    "previous_saliency": ("token", "previous"),
    "features": ("time", "mel"),
    "input_scores": ("input_mask", "token"),
    "encoder_scores": ("encoder_mask", "token"),
    "segment_score": ("token", "segment"),
    "segment_count": ("segment",),
    "segment_weight": ("token", "segment"),
    "segmentation": ("level", "time", "mel"),
}


def build(
    arrays: dict[str, np.ndarray],
    *,
    tokens: Sequence[str],
    times: np.ndarray,
    step_frames: np.ndarray,
    bands: np.ndarray | None = None,
    attributes: dict,
) -> xr.Dataset:
    """Put arrays into a dataset with the kit's axes.

    Args:
        arrays: named as in DIMENSIONS, whose shapes they have.
        tokens: subword strings, one a token.
        times: seconds of the frames, see `frame_times`.
        step_frames: first frame and frame after the last one of each step, int (S, 2); see `S2TModel.step_frames`.
        bands: centre frequencies in Hz, if they are known.
        attributes: provenance.
    """
    coordinates = {"token": np.array(tokens, dtype=str), "word": ("token", words_of(tokens))}
    coordinates["time"] = "time", times, {"total": len(times)}
    coordinates |= step_coordinates(times, step_frames)
    if bands is not None:
        coordinates["mel"] = bands
    for axis, length in zip(("layer", "head"), arrays["cross_attention"].shape, strict=False):
        coordinates[axis] = axis, 1 + np.arange(length), {"total": length}
    variables = {name: (DIMENSIONS[name], values) for name, values in arrays.items()}
    return with_cells(xr.Dataset(variables, coords=coordinates, attrs=attributes))


def frame_times(frames: int, first: float = WINDOW_SECONDS / 2, hop: float = FRAME_SECONDS) -> np.ndarray:
    """Seconds (T,) at the centres of the windows of frames."""
    return first + hop * np.arange(frames)


def step_coordinates(times: np.ndarray, step_frames: np.ndarray) -> dict:
    """Coordinates of steps: `step`, the middle of their frames within the recording, `step_start` and `step_end`."""
    first, end = step_frames.T
    hop = times[1] - times[0] if len(times) > 1 else FRAME_SECONDS
    start = times[0] - hop / 2
    middle = (times[np.maximum(first, 0)] + times[np.minimum(end, len(times)) - 1]) / 2
    return {"step": middle, "step_start": ("step", start + hop * first), "step_end": ("step", start + hop * end)}


def shifted(maps: xr.Dataset, seconds: float) -> xr.Dataset:
    """Move all times of maps by so many seconds, as for a part of a recording."""
    names = "time", "step", "step_start", "step_end"
    return maps.assign_coords({name: maps[name].copy(data=maps[name].values + seconds) for name in names})


def word_numbers(tokens: Sequence[str]) -> np.ndarray:
    """The number of the word that each token belongs to, from 0; special tokens are words of their own."""
    special = np.isin(tokens, SPECIAL_TOKENS)
    begins = np.array([token.startswith(WORD_START) for token in tokens], dtype=bool) | special
    begins[1:] |= special[:-1]
    return np.cumsum(begins) - begins[:1].sum()


def selected_word_numbers(attribution: xr.DataArray | xr.Dataset) -> np.ndarray:
    """`word_numbers` of an array or dataset, of which a selection can leave parts of different words side by side."""
    words, numbers = attribution.word.values, word_numbers(attribution.token.values)
    numbers[1:] += np.cumsum((numbers[1:] == numbers[:-1]) & (words[1:] != words[:-1]))
    return numbers


def words_of(tokens: Sequence[str]) -> np.ndarray:
    """The word that each token belongs to, str (I,)."""
    numbers = word_numbers(tokens)
    words = [spelled(np.array(tokens)[numbers == number]) for number in range(max(numbers) + 1)]
    return np.array(words)[numbers]


def spelled(tokens: Sequence[str]) -> str:
    """Join consecutive tokens to text without ▁, and the bytes of a character to the character."""
    return BYTES.sub(_decoded, "".join(tokens)).replace(WORD_START, "")


def _decoded(run: re.Match) -> str:
    try:
        return bytes.fromhex(re.sub("<0x|>", "", run[0])).decode()
    except UnicodeDecodeError:  # some are not part of a whole character
        return run[0]


def with_cells(maps: xr.Dataset) -> xr.Dataset:
    """Add input_saliency (token, time, mel) to maps that hold it only as segments; return other maps unchanged."""
    if "segmentation" not in maps:
        return maps
    if "segment_weight" in maps:
        units = UnitWeights(maps.segment_weight.values)
    else:
        units = UnitScores(maps.segment_score.values, maps.segment_count.values)
    return maps.assign(input_saliency=(DIMENSIONS["input_saliency"], units.cells(maps.segmentation.values)))


def without_cells(maps: xr.Dataset) -> xr.Dataset:
    """Drop input_saliency from maps that also hold it as segments, which take a fraction of the space."""
    return maps.drop_vars("input_saliency") if "segmentation" in maps else maps


def upgraded(maps: xr.Dataset) -> xr.Dataset:
    """Add what maps of earlier versions lack: words, step edges (from `subsampling` and `lead`), tokens as strings."""
    if "step_start" in maps.coords:
        return maps
    first = maps.subsampling * np.arange(maps.sizes["step"]) - maps.attrs.get("lead", 0)
    tokens = maps.token.values.tolist()
    return maps.assign_coords(
        token=np.array(tokens, dtype=str),
        word=("token", words_of(tokens)),
        **step_coordinates(maps.time.values, np.stack([first, first + maps.subsampling], axis=1)),
    )


def masks_of(maps: xr.Dataset, place: str) -> Masks:
    """The perturbations behind the stored scores of a place, "input" or "encoder"."""
    labels = maps.segmentation.values if place == "input" else np.arange(maps.sizes["step"])[None]
    bounds = np.array([*(level.min() for level in labels), labels.max() + 1])
    number, p = maps.sizes[f"{place}_mask"], maps.attrs[f"{place}_p"]
    return Masks(Partition(labels, bounds), number, p, maps.seed, f"{maps.utterance}/{place}")


def drop_special_tokens(maps: xr.Dataset | xr.DataArray) -> xr.Dataset | xr.DataArray:
    """Drop the rows of BOS and EOS, which the paper leaves out of every correlation (section 3)."""
    return maps.isel(token=~np.isin(maps.token.values, SPECIAL_TOKENS))


def padding_share(maps: xr.Dataset) -> float:
    """The share of the cross-attention on padding beyond the recording, averaged over layers, heads and tokens."""
    return float(drop_special_tokens(maps).padding_attention.mean())


def on_words(attribution: xr.DataArray) -> xr.DataArray:
    """Average an attribution (..., token, ...) over the tokens of each word: (..., word, ...)."""
    numbers = selected_word_numbers(attribution)
    words = attribution.word.values[np.unique(numbers, return_index=True)[1]]
    numbers = xr.DataArray(numbers, dims="token", name="number")
    averaged = attribution.drop_vars(["token", "word"]).groupby(numbers).mean()
    return averaged.rename(number="word").assign_coords(word=words).transpose(*_renamed(attribution.dims))


def _renamed(dims: tuple) -> tuple:
    return tuple("word" if dim == "token" else dim for dim in dims)


def frames_of_steps(attribution: xr.DataArray | xr.Dataset, times: np.ndarray) -> np.ndarray:
    """First frame and frame after the last one of each step among frames at `times` seconds, int (S, 2).

    Both can lie outside the frames, if the step reaches beyond the recording or beyond a selected stretch of it.
    """
    start, end = attribution.step_start.values, attribution.step_end.values
    hop = times[1] - times[0] if len(times) > 1 else (end - start)[0]
    return np.rint((np.stack([start, end], axis=1) - times[0]) / hop + 0.5).astype(int)


def on_steps(saliency: xr.DataArray, steps: xr.DataArray | xr.Dataset, reduction: str = "2d_max") -> xr.DataArray:
    """Reduce the saliency of cells to the encoder steps of another array.

    Args:
        saliency: (token, time, mel); an array that has steps already, (token, step), is returned unchanged.
        steps: an array or dataset with the dimension step, such as cross_attention.
        reduction: see `reduce_to_steps`.

    Returns:
        (token, step), for the steps that cover at least one frame of `saliency`.
    """
    if "step" in saliency.dims:
        return saliency
    frames = frames_of_steps(steps, saliency.time.values)
    covered = (frames[:, 0] < saliency.sizes["time"]) & (frames[:, 1] > 0)
    reduced = reduce_to_steps(saliency.transpose("token", "time", "mel").values, frames[covered], reduction)
    kept = steps.isel(step=covered)
    coordinates = {name: kept[name] for name in ("step", "step_start", "step_end")}
    coordinates |= {name: saliency[name] for name in ("token", "word") if name in saliency.coords}
    return xr.DataArray(reduced, dims=("token", "step"), coords=coordinates, name=saliency.name)


def reduce_to_steps(saliency: np.ndarray, step_frames: np.ndarray, reduction: str = "2d_max") -> np.ndarray:
    """Reduce cells (token, time, mel) to steps that cover the given frames, int (S, 2): (token, step).

    "2d_max" is the maximum over a step's frames and all bands (the paper's choice, Table 1), "2d_avg" the mean. For
    "1d_max_1d_avg" the paper leaves the axes open; here it is the maximum over the bands, then the mean over the
    frames. A step that reaches beyond the frames repeats the first or the last one.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"There is no reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}.")
    width = step_frames[0, 1] - step_frames[0, 0]
    frames = np.clip(step_frames[:, :1] + np.arange(width), 0, saliency.shape[1] - 1)  # (S, width)
    windows = saliency[:, frames]  # (token, S, width, mel)
    if reduction == "2d_max":
        return windows.max(axis=(2, 3))
    if reduction == "2d_avg":
        return windows.mean(axis=(2, 3))
    return windows.max(axis=3).mean(axis=2)


def expand_to_frames(steps: np.ndarray, step_frames: np.ndarray, frames: int, bands: int) -> np.ndarray:
    """Give the value of each step (token, step) to all its frames and bands: (token, frames, bands).

    Frames after the last step take its value.
    """
    own = np.searchsorted(step_frames[:, 0], np.arange(frames), side="right") - 1
    return np.broadcast_to(steps[:, own, None], (len(steps), frames, bands))
