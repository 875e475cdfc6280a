"""Files of other tools: explanations of SPES, read and written, and the attention that stands beside them.

SPES (FBK-fairseq, described there in fbk_works/XAI_FEATURE_ATTRIBUTION.md) writes one HDF5 file a test set. Each
utterance is a group, named by its number in the data set, with `fbank_heatmap` (I, T, F), or (I, T, 1) where whole
steps were hidden; `tgt_embed_heatmap` (I, I, 1), the saliency of the previous tokens; `tgt_text` (I,); `n_masks`; and
`src_text` where the data set has one. Files merged from two runs lack the last two. `tgt_text` holds the decoder's
inputs, from the </s> they begin with. Here a row is named by the token that it explains, which is the next one, up to
the final </s>.

Such a file does not say how the model attended. A released setting is therefore a folder <model>/<setting> of

    input_saliency.h5     SM^X, as SPES writes it
    cross_attention.h5    CA: for each utterance an array (L, H, I, S), under the name that its group has above
    encoder_saliency.h5   SM^H, optional: as SPES would write it, with `fbank_heatmap` (I, S, 1)
    manifest.tsv          optional: the data set's table as fairseq reads it, row n being utterance n, for references

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
from xattn.compare import SOURCES, SPECIAL_TOKENS, lead_of, sources_of, spoken_tokens, windows_fit
from xattn.explain import coordinates, frame_times

SALIENCY = {source: f"{source}_saliency.h5" for source in SOURCES}
ATTENTION, MANIFEST = "cross_attention.h5", "manifest.tsv"
OURS = "xattn"  # the attribute of a group that holds those of our maps, where other tools do not look
AXES = ("time", "mel")  # seconds and Hz, written beside it
HELD = {"fbank_heatmap": np.asarray, "tgt_embed_heatmap": np.asarray, "tgt_text": list, "n_masks": int, "src_text": str}
END = "</s>"
LANGUAGE_TAG = re.compile(r"<lang:\w+>")
SUM_TOLERANCE = 0.01  # of a row of attention, which may come in half precision
FRAME_TOLERANCE = 2  # a data set's n_frames may have been reckoned from its duration


def read_explanations(path: str | Path, source: str = "input") -> Iterator[xr.Dataset]:
    """The explanations in a file of SPES, one dataset an utterance, in the order of their numbers.

    Args:
        source: what was hidden, "input" (superpixels) or "encoder" (whole steps of its output).

    Returns:
        input_saliency (token, time, mel) or encoder_saliency (token, step), as they stand in the file: NaN where the
        reference met a probability of 0. previous_saliency (token, previous), unless it is 0 everywhere, as it is where
        the previous tokens were not hidden. Attributes: utterance, hypothesis, estimator, and input_masks or
        encoder_masks and source_text where the file has them; all attributes, where the maps are our own.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not what SPES writes.
    """
    with _opened(Path(path)) as file:
        for name in _utterances(file):
            yield _explanation(file, name, source)


def write_explanations(maps: Iterable[xr.Dataset], path: str | Path, source: str = "input") -> None:
    """Write SM^X or SM^H of datasets of `xattn.explain` or `read_explanations` as a file of SPES, whole or not at all.

    Utterances are numbered, as its readers demand, and keep the numbers they have. Values keep their precision: double
    for our maps, single for those of SPES. The model's input, the superpixels and the scores of perturbations have no
    place in such a file; our attributes and axes are put where other tools do not look.
    """
    with _new(Path(path)) as file:
        for number, item in enumerate(maps):
            _write(file, number, item, source)


def write_released(maps: Iterable[xr.Dataset], folder: str | Path) -> None:
    """Write maps of one model and setting, such as those of `xattn.store.load_all`, as a released setting."""
    with ExitStack() as stack:
        files = {source: stack.enter_context(_new(Path(folder, name))) for source, name in SALIENCY.items()}
        attention = stack.enter_context(_new(Path(folder, ATTENTION)))
        for number, item in enumerate(maps):
            if "padding_attention" in item:
                raise ValueError(f"{item.model} also attends to padding, which such files do not hold: keep its maps.")
            for source, file in files.items():
                name = _write(file, number, item, source)
            attention[name] = item.cross_attention.values


def read_released(folder: str | Path, subsampling: int = 4) -> Iterator[xr.Dataset]:
    """The maps of a released setting in the form of `xattn.explain`, one dataset an utterance.

    The row of a language tag that the output begins with is dropped, as the model does not choose it. So are tokens
    whose maps are not finite, and the attribute left_out names them: the reference's scores are NaN where a probability
    was 0, and its normalisation then makes the map 0, as if nothing had mattered, whereas nothing is known.

    Args:
        folder: <model>/<setting>, as above.
        subsampling: frames that an encoder step covers; our own maps know theirs.

    Raises:
        FileNotFoundError, ValueError: one sentence that says which file and utterance is not as it should be.
    """
    folder = Path(folder).absolute()
    unknown = {f"{source}_reliability": math.nan for source in SOURCES}
    defaults = {"model": folder.parent.name, "setting": folder.name, "subsampling": subsampling, "reference": ""}
    references = _references(folder / MANIFEST)
    with ExitStack() as stack:
        there = [source for source, name in SALIENCY.items() if source == "input" or (folder / name).exists()]
        files = {source: stack.enter_context(_opened(folder / SALIENCY[source])) for source in there}
        attention = stack.enter_context(_opened(folder / ATTENTION))
        for file in (attention, *files.values()):
            _require_same_utterances(files["input"], file)
        for name in _utterances(attention):
            first, *others = (_explanation(file, name, source) for source, file in files.items())
            maps = first.assign_attrs(unknown | defaults | first.attrs)
            if [maps.model, maps.setting] != [folder.parent.name, folder.name]:
                raise ValueError(f"{folder} holds maps of {maps.model}/{maps.setting}: move them to a folder so named.")
            if references is not None:
                maps.attrs["reference"] = _reference(references, folder / MANIFEST, name, maps.sizes["time"])
            yield _without_unknown(_joined(maps, others, attention, name))


def import_released(folder: str | Path, maps: str | Path, subsampling: int = 4) -> None:
    """Bring a released setting into the store `maps`, where the notebooks read it; what is there already is kept.

    An utterance's key is the hash of all that was read of it. One with fewer than two tokens is left out, as nothing
    can be correlated there. Raises as `read_released`.
    """
    keys = {}
    for item in read_released(folder, subsampling):
        where = f"{item.model} {item.setting}, utterance {item.utterance}"
        if "left_out" in item.attrs:
            print(f"{where}: left out {', '.join(item.left_out)}, whose maps are not finite")
        if spoken_tokens(item).sizes["token"] < 2:
            print(f"{where}: left out, as it has fewer than two tokens")
            continue
        if item.utterance in keys or Path(item.utterance).name != item.utterance:
            raise ValueError(f"{where}: its name is that of another, or of no file: rename it in {folder}.")
        keys[item.utterance] = key = _hash(item)
        path = store.path_of(maps, item.model, item.setting, item.utterance)
        if not store.is_current(path, key):
            store.save(item, path, key)
    if not keys:
        raise ValueError(f"{folder} has no utterance of two tokens or more, so there is nothing to correlate.")
    store.save_index(keys, maps, item.model, item.setting)
    print(f"{item.model} {item.setting}: {len(keys)} utterances")


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: put it there (the README says which file goes where).")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file, or was cut short ({_line(error)}): copy it again.") from error
    with file:
        yield file


@contextmanager
def _new(path: Path) -> Iterator[h5py.File]:
    with store.replacing(path) as temporary, h5py.File(temporary, "w") as file:
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
                "both must hold the same ones, under the same names."
            )


def _explanation(file: h5py.File, name: str, source: str) -> xr.Dataset:
    """One utterance of a file of SPES."""
    where = f"{file.filename}, utterance {name}"
    try:
        group = file[name]
        if not isinstance(group, h5py.Group):
            raise TypeError("it is an array")
        held = {each: convert(_value(group[each])) for each, convert in HELD.items() if each in group}
        own = dict(json.loads(group.attrs.get(OURS, "{}")))
        axes = {axis: group[axis][()] for axis in AXES if own and source == "input"}
    except Exception as error:  # whatever flipped bits make of a group
        raise ValueError(f"{where}: it is no group that can be read ({_line(error)}).") from error
    lacking = [each for each in ("fbank_heatmap", "tgt_text") if each not in held]
    if lacking:
        raise ValueError(f"{where}: it lacks {' and '.join(lacking)}, so it is no explanation of SPES.")
    saliency, inputs, previous = held["fbank_heatmap"], held["tgt_text"], held.get("tgt_embed_heatmap")
    rows = len(inputs)
    fits = saliency.ndim == 3 and len(saliency) == rows and (source == "input" or saliency.shape[2] == 1)
    if not fits or saliency.dtype.kind != "f" or not saliency.size:
        cells = "steps x 1" if source == "encoder" else "frames x bands"
        raise ValueError(f"{where}: fbank_heatmap is {_kind(saliency)}, not the {rows} tokens of tgt_text x {cells}.")
    if previous is not None and previous.shape != (rows, rows, 1):
        raise ValueError(
            f"{where}: tgt_embed_heatmap is {_kind(previous)}, not {rows} x {rows} tokens of tgt_text x 1."
        )
    if inputs[0] != END:
        raise ValueError(f"{where}: tgt_text starts with {inputs[0]!r} instead of the {END} that SPES puts first.")
    tokens = [*inputs[1:], END]
    cells = (("token", "step"), saliency[..., 0]) if source == "encoder" else (("token", "time", "mel"), saliency)
    variables = {f"{source}_saliency": cells}
    if previous is not None and previous.any():
        variables["previous_saliency"] = (("token", "previous"), previous[..., 0])
    attributes = {"utterance": name, "hypothesis": _text(tokens), "estimator": "mean"}
    if "n_masks" in held:
        attributes[f"{source}_masks"] = held["n_masks"]
    if "src_text" in held:
        attributes["source_text"] = held["src_text"]
    coords = {"token": np.array(tokens, dtype=object)} | axes
    return xr.Dataset(variables, coords=coords, attrs=attributes | own)


def _value(dataset: h5py.Dataset) -> np.ndarray | np.generic | str:
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]


def _kind(values: np.ndarray) -> str:
    return f"{values.dtype} {' x '.join(map(str, values.shape)) or 'scalar'}"


def _text(tokens: list[str]) -> str:
    """The text that SentencePiece tokens spell: ▁ is a space."""
    spoken = [token for token in tokens if token not in SPECIAL_TOKENS and not LANGUAGE_TAG.fullmatch(token)]
    return "".join(spoken).replace("▁", " ").strip()


def _write(file: h5py.File, number: int, maps: xr.Dataset, source: str) -> str:
    """Write one utterance as a group of a file of SPES, and return its name."""
    name = maps.utterance if maps.utterance.isdecimal() else str(number)
    tokens, values = maps.token.values.tolist(), maps[f"{source}_saliency"].values
    if tokens[-1] != END:
        raise ValueError(
            f"Utterance {maps.utterance} ends in {tokens[-1]!r}, not in {END}: SPES has no place for that."
        )
    if name in file:
        raise ValueError(f"Utterance {maps.utterance} would be a second one of the number {name}: rename it.")
    group, previous = file.create_group(name), np.zeros((len(tokens), len(tokens)), dtype=np.float32)
    if "previous_saliency" in maps:
        previous = maps.previous_saliency.values
    group["fbank_heatmap"] = values[..., None] if source == "encoder" else values
    group["tgt_embed_heatmap"] = previous[..., None]
    group.create_dataset("tgt_text", data=[END, *tokens[:-1]], dtype=h5py.string_dtype())
    masks = maps.sizes.get(f"{source}_mask", maps.attrs.get(f"{source}_masks"))
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
    """The table of a data set, tab-separated and without quotes; None where it is not there."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"{path} is no table in UTF-8 with tabs ({_line(error)}): copy it again.") from error
    if "tgt_text" not in table:
        raise ValueError(f"{path} has no column tgt_text: give the data set's table, with the references there.")
    return table


def _reference(table: pd.DataFrame, path: Path, name: str, frames: int) -> str:
    if not name.isdecimal() or int(name) >= len(table):
        raise ValueError(
            f"{path} has {len(table)} rows and none for utterance {name}: give the data set's whole table."
        )
    row = table.iloc[int(name)]
    stated = row.get("n_frames", str(frames))
    if not stated.isdecimal() or abs(int(stated) - frames) > FRAME_TOLERANCE:
        raise ValueError(
            f"{path} gives utterance {name} {stated} frames, but its map has {frames}: give the table of the data set "
            "that was explained."
        )
    return row.tgt_text


def _joined(maps: xr.Dataset, others: list[xr.Dataset], file: h5py.File, name: str) -> xr.Dataset:
    """SM^X, SM^H where it is there, and CA of one utterance in one dataset, checked against one another."""
    where, tokens = f"{file.filename}, utterance {name}", maps.token.values
    try:
        attention = np.asarray(file[name])
    except Exception as error:  # whatever flipped bits make of an array
        raise ValueError(f"{where}: it is no array that can be read ({_line(error)}).") from error
    if attention.ndim != 4 or attention.shape[2] != len(tokens) or attention.dtype.kind != "f" or not attention.size:
        raise ValueError(
            f"{where}: it is {_kind(attention)}, not layers x heads x the {len(tokens)} tokens (with {END}) of "
            f"{SALIENCY['input']} x steps."
        )
    error = np.abs(attention.sum(axis=-1, dtype=np.float64) - 1).max()
    if not error <= SUM_TOLERANCE:
        raise ValueError(f"{where}: its rows sum to 1 only within {error:.2g}: give attention weights, after softmax.")
    frames, steps = maps.sizes["time"], attention.shape[-1]
    if not windows_fit(frames, steps, maps.subsampling, lead_of(maps)):
        raise ValueError(
            f"{where}: {steps} steps of {maps.subsampling} frames do not fit the {frames} frames of "
            f"{SALIENCY['input']}: give the model's own subsampling, or the attention to this utterance."
        )
    for other in others:
        if not np.array_equal(other.token.values, tokens) or other.sizes["step"] != steps:
            raise ValueError(
                f"{where}: {SALIENCY['encoder']} beside it has {other.sizes['token']} tokens and {other.sizes['step']} "
                f"steps, or other tokens: all must be of one output, here {len(tokens)} and {steps}."
            )
        maps = maps.assign(encoder_saliency=other.encoder_saliency)
    attention = attention.astype(np.promote_types(attention.dtype, np.float32))  # means in half precision are coarse
    times = maps.time.values if "time" in maps.coords else frame_times(frames)
    maps = maps.assign(cross_attention=(("layer", "head", "token", "step"), attention))
    maps = maps.assign_coords(coordinates(tokens, attention, times, maps.subsampling, lead_of(maps)))
    return maps.drop_vars("previous_saliency", errors="ignore")


def _without_unknown(maps: xr.Dataset) -> xr.Dataset:
    """The maps without the row of a leading language tag and those of tokens whose saliency is not finite."""
    rows, finite = maps.token.values, np.ones(maps.sizes["token"], dtype=bool)
    for source in sources_of(maps):
        finite &= np.isfinite(maps[f"{source}_saliency"].values).reshape(len(finite), -1).all(axis=1)
    wanted = np.ones_like(finite)
    wanted[0] = "mel" in maps.coords or not LANGUAGE_TAG.fullmatch(rows[0])  # our maps have no rows of the prompt
    lost = [f"{rows[row]} (row {row})" for row in np.flatnonzero(wanted & ~finite)]
    kept = maps.isel(token=wanted & finite)
    return kept.assign_attrs(left_out=lost) if lost else kept


def _hash(maps: xr.Dataset) -> str:
    digest = hashlib.sha256(json.dumps(maps.attrs, sort_keys=True).encode())
    for name, variable in sorted(maps.variables.items()):
        values = np.array("\n".join(variable.values)) if variable.dtype == object else variable.values
        digest.update(f"{name} {variable.dims} {variable.shape} {values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
