"""Maps from other tools: the HDF5 files of SPES, with the attention that belongs to them.

SPES (FBK-fairseq, fbk_works/XAI_FEATURE_ATTRIBUTION.md) writes one HDF5 file for a test set. Each utterance is a group,
named by its number in the data set, with `fbank_heatmap` (I, T, F), or (I, T, 1) if whole steps were hidden;
`tgt_embed_heatmap` (I, I, 1), the saliency of the previous tokens; `tgt_text` (I,); `n_masks`; and `src_text` if the
data set has one. Files merged from two runs lack the last two. `tgt_text` holds the decoder's inputs, starting with
</s>. In this kit a row has the name of the token that it explains, which is the next one, up to the final </s>.

Such a file does not contain attention. Released maps of a model and direction are therefore a folder
<model>/<direction> with

    input_saliency.h5     SM^X, as SPES writes it
    cross_attention.h5    CA: an array (L, H, I, S) for each utterance, under the name of its group above
    encoder_saliency.h5   SM^H, optional, as SPES would write it, with `fbank_heatmap` (I, S, 1)
    manifest.tsv          optional, with the references: the data set's table for fairseq, row n being utterance n

Letters in shapes: I tokens, T frames, F bands, S encoder steps, L decoder layers, H heads.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from xattn import store
from xattn.files import replacing
from xattn.maps import SALIENCIES, SPECIAL_TOKENS, build, drop_special_tokens, frame_times, frames_of_steps

FILES = {name: f"{name}.h5" for name in SALIENCIES}
ATTENTION, MANIFEST = "cross_attention.h5", "manifest.tsv"
OURS = "xattn"  # the attribute of a group with the attributes of our maps; other tools ignore it
AXES = ("time", "mel", "step_start", "step_end")  # our coordinates, which other tools ignore too
HELD = {"fbank_heatmap": np.asarray, "tgt_embed_heatmap": np.asarray, "tgt_text": list, "n_masks": int, "src_text": str}
END = "</s>"
LANGUAGE_TAG = re.compile(r"<lang:\w+>")
SUM_TOLERANCE = 0.01  # of a row of attention, which can be in half precision
FRAME_TOLERANCE = 2  # a data set's n_frames can be derived from its duration


def read_explanations(path: str | Path, saliency: str = "input_saliency") -> Iterator[xr.Dataset]:
    """Read the explanations in a file of SPES, one dataset for each utterance, in the order of their numbers.

    Args:
        saliency: what the file holds, "input_saliency" (superpixels were hidden) or "encoder_saliency" (whole steps of
            the encoder's output were).

    Returns:
        input_saliency (token, time, mel) or encoder_saliency (token, step), unchanged: NaN where the reference met a
        probability of 0. previous_saliency (token, previous), unless it is 0 everywhere because the previous tokens
        were not hidden. Attributes: utterance, hypothesis, estimator, and input_masks or encoder_masks and source_text
        if the file has them; all attributes of the kit's own maps.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or SPES did not write it.
    """
    with _opened(Path(path)) as file:
        for name in _utterances(file):
            yield _explanation(file, name, saliency)


def write_explanations(maps: Iterable[xr.Dataset], path: str | Path, saliency: str = "input_saliency") -> None:
    """Write SM^X or SM^H of datasets of `xattn.explain` or `read_explanations` as a file of SPES.

    Utterances are numbered, as its readers require; numbers as names are kept. Values keep their precision: double for
    the kit's maps, single for those of SPES. The file has no place for the model's input, the superpixels and the
    scores of perturbations; the kit's attributes and axes are stored where other tools ignore them.
    """
    with _new(Path(path)) as file:
        for number, item in enumerate(maps):
            _write(file, number, item, saliency)


def write_released(maps: Iterable[xr.Dataset], folder: str | Path) -> None:
    """Write maps of one model and direction, such as those of `xattn.load_maps`, as a folder of released maps."""
    with ExitStack() as stack:
        files = {saliency: stack.enter_context(_new(Path(folder, name))) for saliency, name in FILES.items()}
        attention = stack.enter_context(_new(Path(folder, ATTENTION)))
        for number, item in enumerate(maps):
            if "padding_attention" in item:
                raise ValueError(f"{item.model} also attends to padding, which such files cannot hold: keep its maps.")
            for saliency, file in files.items():
                name = _write(file, number, item, saliency)
            attention[name] = item.cross_attention.values


def read_released(folder: str | Path, subsampling: int = 4) -> Iterator[xr.Dataset]:
    """Read released maps of a model and direction in the form of `xattn.explain`, one dataset for each utterance.

    The row of a language tag at the start of the output is dropped, because the model does not choose it. Tokens whose
    maps are not finite are dropped too and listed in the attribute left_out: the reference's scores are NaN where a
    probability was 0, and its normalisation then makes the map 0, as if nothing had mattered.

    Args:
        folder: <model>/<direction>, see the module's docstring.
        subsampling: frames per encoder step; the kit's own maps state theirs.

    Raises:
        FileNotFoundError, ValueError: which file and utterance is wrong, in one sentence.
    """
    folder = Path(folder).absolute()
    unknown = {f"{name.removesuffix('_saliency')}_reliability": math.nan for name in SALIENCIES}
    defaults = {"model": folder.parent.name, "setting": folder.name, "reference": ""}
    references = _references(folder / MANIFEST)
    with ExitStack() as stack:
        there = [saliency for saliency, name in FILES.items() if saliency == SALIENCIES[0] or (folder / name).exists()]
        files = {saliency: stack.enter_context(_opened(folder / FILES[saliency])) for saliency in there}
        attention = stack.enter_context(_opened(folder / ATTENTION))
        for file in (attention, *files.values()):
            _require_same_utterances(files[SALIENCIES[0]], file)
        for name in _utterances(attention):
            first, *others = (_explanation(file, name, saliency) for saliency, file in files.items())
            maps = first.assign_attrs(unknown | defaults | first.attrs)
            if [maps.model, maps.setting] != [folder.parent.name, folder.name]:
                raise ValueError(
                    f"{folder} holds maps of {maps.model}/{maps.setting}: move them to a folder with that name."
                )
            if references is not None:
                maps.attrs["reference"] = _reference(references, folder / MANIFEST, name, maps.sizes["time"])
            yield _without_unknown(_joined(maps, others, attention, name, subsampling))


def import_released(folder: str | Path, maps: str | Path, subsampling: int = 4) -> None:
    """Copy released maps of a model and direction into the folder `maps`, from which the notebooks read.

    Maps that are there already are kept. The key of an utterance is the hash of all that was read. Utterances with
    fewer than two tokens are skipped, because nothing can be correlated there. Errors: see `read_released`.
    """
    keys = {}
    for item in read_released(folder, subsampling):
        where = f"{item.model} {item.setting}, utterance {item.utterance}"
        if "left_out" in item.attrs:
            print(f"{where}: dropped {', '.join(item.left_out)}, because their maps are not finite")
        if drop_special_tokens(item).sizes["token"] < 2:
            print(f"{where}: skipped, because it has fewer than two tokens")
            continue
        if item.utterance in keys or Path(item.utterance).name != item.utterance:
            raise ValueError(f"{where}: its name is repeated or cannot be a file name: rename it in {folder}.")
        keys[item.utterance] = key = _hash(item)
        path = store.path_of(maps, item.model, item.setting, item.utterance)
        if not store.is_current(path, key):
            store.save(item, path, key)
    if not keys:
        raise ValueError(f"{folder} has no utterance with two or more tokens, so there is nothing to correlate.")
    store.save_index(keys, maps, item.model, item.setting)
    print(f"{item.model} {item.setting}: {len(keys)} utterances")


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: put it there (docs/released.md says which file goes where).")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not an HDF5 file, or is incomplete ({_line(error)}): copy it again.") from error
    with file:
        yield file


@contextmanager
def _new(path: Path) -> Iterator[h5py.File]:
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        yield file


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _utterances(file: h5py.File) -> list[str]:
    """Names in the order of their numbers; HDF5 lists "10" before "2"."""
    try:
        names = sorted(file, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    except RuntimeError as error:
        raise ValueError(f"{file.filename} is damaged ({_line(error)}): copy it again.") from error
    if not names:
        raise ValueError(f"{file.filename} holds no utterance: copy it again.")
    return names


def _require_same_utterances(first: h5py.File, second: h5py.File) -> None:
    for one, other in ((first, second), (second, first)):
        names = set(_utterances(other))
        missing = [name for name in _utterances(one) if name not in names]
        if missing:
            more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
            raise ValueError(
                f"Utterance {missing[0]}{more} is in {one.filename}, but not in {Path(other.filename).name} beside it: "
                "both must hold the same utterances under the same names."
            )


def _explanation(file: h5py.File, name: str, saliency: str) -> xr.Dataset:
    """Read one utterance of a file of SPES."""
    where, on_steps = f"{file.filename}, utterance {name}", saliency == "encoder_saliency"
    try:
        group = file[name]
        if not isinstance(group, h5py.Group):
            raise TypeError("it is an array")
        held = {each: convert(_value(group[each])) for each, convert in HELD.items() if each in group}
        own = dict(json.loads(group.attrs.get(OURS, "{}")))
        axes = {axis: group[axis][()] for axis in AXES if own and axis in group}
    except Exception as error:  # a damaged group can raise anything
        raise ValueError(f"{where}: the group cannot be read ({_line(error)}).") from error
    lacking = [each for each in ("fbank_heatmap", "tgt_text") if each not in held]
    if lacking:
        raise ValueError(f"{where}: it lacks {' and '.join(lacking)}, so it is not an explanation of SPES.")
    values, inputs, previous = held["fbank_heatmap"], held["tgt_text"], held.get("tgt_embed_heatmap")
    rows = len(inputs)
    fits = values.ndim == 3 and len(values) == rows and (not on_steps or values.shape[2] == 1)
    if not fits or values.dtype.kind != "f" or not values.size:
        cells = "steps x 1" if on_steps else "frames x bands"
        raise ValueError(f"{where}: fbank_heatmap is {_kind(values)}, not the {rows} tokens of tgt_text x {cells}.")
    if previous is not None and previous.shape != (rows, rows, 1):
        raise ValueError(
            f"{where}: tgt_embed_heatmap is {_kind(previous)}, not {rows} x {rows} tokens of tgt_text x 1."
        )
    if inputs[0] != END:
        raise ValueError(f"{where}: tgt_text starts with {inputs[0]!r} instead of the {END} that SPES puts first.")
    tokens = [*inputs[1:], END]
    variables = {saliency: (("token", "step"), values[..., 0]) if on_steps else (("token", "time", "mel"), values)}
    if previous is not None and previous.any():
        variables["previous_saliency"] = (("token", "previous"), previous[..., 0])
    attributes = {"utterance": name, "hypothesis": _text(tokens), "estimator": "mean"}
    if "n_masks" in held:
        attributes[f"{saliency.removesuffix('_saliency')}_masks"] = held["n_masks"]
    if "src_text" in held:
        attributes["source_text"] = held["src_text"]
    coords = {"token": np.array(tokens, dtype=str)}
    coords |= {axis: axes[axis] for axis in ("time", "mel") if axis in axes and not on_steps}
    dataset = xr.Dataset(variables, coords=coords, attrs=attributes | own)
    if "step_start" in axes:
        edges = {axis: ("step", axes[axis]) for axis in ("step_start", "step_end")}
        dataset = dataset.assign_coords(edges)
    return dataset


def _value(dataset: h5py.Dataset) -> np.ndarray | np.generic | str:
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]


def _kind(values: np.ndarray) -> str:
    return f"{values.dtype} {' x '.join(map(str, values.shape)) or 'scalar'}"


def _text(tokens: list[str]) -> str:
    """The text that SentencePiece tokens spell: ▁ is a space."""
    spoken = [token for token in tokens if token not in SPECIAL_TOKENS and not LANGUAGE_TAG.fullmatch(token)]
    return "".join(spoken).replace("▁", " ").strip()


def _write(file: h5py.File, number: int, maps: xr.Dataset, saliency: str) -> str:
    """Write one utterance as a group of a file of SPES, and return its name."""
    name = maps.utterance if maps.utterance.isdecimal() else str(number)
    tokens, values = maps.token.values.tolist(), maps[saliency].values
    if tokens[-1] != END:
        raise ValueError(f"Utterance {maps.utterance} ends in {tokens[-1]!r}, but SPES needs {END} there.")
    if name in file:
        raise ValueError(f"A second utterance would have the number {name} of {maps.utterance}: rename one.")
    group, previous = file.create_group(name), np.zeros((len(tokens), len(tokens)), dtype=np.float32)
    if "previous_saliency" in maps:
        previous = maps.previous_saliency.values
    group["fbank_heatmap"] = values[..., None] if saliency == "encoder_saliency" else values
    group["tgt_embed_heatmap"] = previous[..., None]
    group.create_dataset("tgt_text", data=[END, *tokens[:-1]], dtype=h5py.string_dtype())
    place = saliency.removesuffix("_saliency")
    masks = maps.sizes.get(f"{place}_mask", maps.attrs.get(f"{place}_masks"))
    if masks is not None:
        group["n_masks"] = np.int64(masks)
    if "source_text" in maps.attrs:
        group.create_dataset("src_text", data=maps.source_text, dtype=h5py.string_dtype())
    if all(axis in maps.coords for axis in AXES):
        group.attrs[OURS] = json.dumps(maps.attrs)
        for axis in AXES:
            group[axis] = maps[axis].values
    return name


def _references(path: Path) -> pd.DataFrame | None:
    """The table of a data set, tab-separated and without quotes; None if there is none."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a tab-separated table in UTF-8 ({_line(error)}): copy it again.") from error
    if "tgt_text" not in table:
        raise ValueError(f"{path} has no column tgt_text: give the data set's table, which has the references there.")
    return table


def _reference(table: pd.DataFrame, path: Path, name: str, frames: int) -> str:
    if not name.isdecimal() or int(name) >= len(table):
        raise ValueError(
            f"{path} has {len(table)} rows and none for utterance {name}: give the data set's complete table."
        )
    row = table.iloc[int(name)]
    stated = row.get("n_frames", str(frames))
    if not stated.isdecimal() or abs(int(stated) - frames) > FRAME_TOLERANCE:
        raise ValueError(
            f"{path} gives utterance {name} {stated} frames, but its map has {frames}: give the table of the data set "
            "that was explained."
        )
    return row.tgt_text


def _joined(maps: xr.Dataset, others: list[xr.Dataset], file: h5py.File, name: str, subsampling: int) -> xr.Dataset:
    """Join SM^X, SM^H if there is one, and CA of an utterance in one dataset, after checking that they fit."""
    where, tokens = f"{file.filename}, utterance {name}", maps.token.values
    try:
        attention = np.asarray(file[name])
    except Exception as error:  # a damaged array can raise anything
        raise ValueError(f"{where}: the array cannot be read ({_line(error)}).") from error
    if attention.ndim != 4 or attention.shape[2] != len(tokens) or attention.dtype.kind != "f" or not attention.size:
        raise ValueError(
            f"{where}: it is {_kind(attention)}, not layers x heads x the {len(tokens)} tokens (with {END}) of "
            f"{FILES['input_saliency']} x steps."
        )
    error = np.abs(attention.sum(axis=-1, dtype=np.float64) - 1).max()
    if not error <= SUM_TOLERANCE:
        raise ValueError(f"{where}: its rows sum to 1 only within {error:.2g}: give attention weights, after softmax.")
    frames, steps = maps.sizes["time"], attention.shape[-1]
    times = maps.time.values if "time" in maps.coords else frame_times(frames)
    step_frames = _step_frames(maps, times, steps, subsampling)
    if step_frames is None:
        raise ValueError(
            f"{where}: {steps} encoder steps do not fit the {frames} frames of {FILES['input_saliency']}: give the "
            "model's own subsampling, or the attention to this utterance."
        )
    for other in others:
        if not np.array_equal(other.token.values, tokens) or other.sizes["step"] != steps:
            raise ValueError(
                f"{where}: {FILES['encoder_saliency']} beside it has {other.sizes['token']} tokens and "
                f"{other.sizes['step']} steps, or other tokens: all must belong to one output, here {len(tokens)} and "
                f"{steps}."
            )
        maps = maps.assign(encoder_saliency=(("token", "step"), other.encoder_saliency.values))
    arrays = {saliency: maps[saliency].values for saliency in SALIENCIES if saliency in maps}
    arrays["cross_attention"] = attention.astype(np.promote_types(attention.dtype, np.float32))  # means need precision
    bands = maps.mel.values if "mel" in maps.coords else None
    return build(arrays, tokens=tokens, times=times, step_frames=step_frames, bands=bands, attributes=maps.attrs)


def _step_frames(maps: xr.Dataset, times: np.ndarray, steps: int, subsampling: int) -> np.ndarray | None:
    """First frame and frame after the last one of each step; None if they do not cover the frames."""
    if "step_start" in maps.coords:
        found = frames_of_steps(maps, times)
    else:
        subsampling = maps.attrs.get("subsampling", subsampling)
        first = subsampling * np.arange(steps) - maps.attrs.get("lead", 0)
        found = np.stack([first, first + subsampling], axis=1)
    lead, width = -found[0, 0], found[0, 1] - found[0, 0]
    missing = found[-1, 1] - len(times)
    fits = lead - width < missing <= lead if lead else 0 <= missing < width  # a lead can leave frames at the end
    return found if len(found) == steps and fits else None


def _without_unknown(maps: xr.Dataset) -> xr.Dataset:
    """Drop the row of a leading language tag and those of tokens whose saliency is not finite."""
    rows, finite = maps.token.values, np.ones(maps.sizes["token"], dtype=bool)
    for saliency in SALIENCIES:
        if saliency in maps:
            finite &= np.isfinite(maps[saliency].values).reshape(len(finite), -1).all(axis=1)
    wanted = np.ones_like(finite)
    wanted[0] = "mel" in maps.coords or not LANGUAGE_TAG.fullmatch(rows[0])  # our maps have no rows of the prompt
    lost = [f"{rows[row]} (row {row})" for row in np.flatnonzero(wanted & ~finite)]
    kept = maps.isel(token=wanted & finite)
    return kept.assign_attrs(left_out=lost) if lost else kept


def _hash(maps: xr.Dataset) -> str:
    digest = hashlib.sha256(json.dumps(maps.attrs, sort_keys=True).encode())
    for name, variable in sorted(maps.variables.items()):
        digest.update(f"{name} {variable.dims} {variable.shape} {variable.dtype}".encode() + variable.values.tobytes())
    return digest.hexdigest()[:16]
