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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import xarray as xr
from tqdm import tqdm

from xattn.audio import SAMPLE_RATE, Recording
from xattn.data.utterance import Utterance, utterance_from_recording
from xattn.explorer_record import add_chunk, record
from xattn.figures import MAP_COLOURS, STYLE, heatmaps
from xattn.files import write_whole
from xattn.store import INDEX, load_maps

COMPRESSION = 0.9  # of Opus: about 30 kbit/s
RHO_COLOURS = "cividis"
NO_SOUND = "There is no sound for this utterance: give its recording as audio=."
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
        records.append(_condition(each, records) | {"chunk": add_chunk(chunks, record(each, deletions, chunks))})
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
    return entry | {"sound": add_chunk(chunks, file.getvalue()), "start": start, "message": ""}


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


# The document


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
