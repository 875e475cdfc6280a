"""Maps of models with randomised layers, compared with those of the original model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr

from reproduction.conditions import progress
from xattn.analysis.correlation import normalised_attention, normalised_saliency
from xattn.analysis.intervals import mean_interval
from xattn.analysis.sanity import randomised
from xattn.data.utterance import Utterance
from xattn.explain import Occlusion, explain_directions
from xattn.models import S2TModel

NAMES = {"cross_attention": "CA", "input_saliency": "SM^X", "encoder_saliency": "SM^H"}


def randomisation(
    model: S2TModel, corpus: Sequence[Utterance], direction: str, layers: Sequence[str], occlusion: Occlusion
) -> pd.DataFrame:
    """Compare maps of the words that a model wrote with those of the same words, after more and more layers are random.

    Args:
        layers: names of layers in the order in which they are randomised.

    Returns:
        A long table: randomised (the number of layers), layer (the last one of them, or empty), map ("CA", "SM^X",
        "SM^H"), value (mean over utterances of Pearson's correlation of the normalised maps), low, high, n. With no
        layer randomised, the original model is explained with other masks.
    """
    texts = {each.id: _written(model, each, direction) for each in corpus}
    corpus = [each for each in corpus if texts[each.id]]
    originals = {each.id: _explain(model, each, direction, occlusion, texts[each.id]) for each in corpus}
    rows = []
    for number in progress(range(len(layers) + 1), "Numbers of randomised layers"):
        changed = randomised(model, layers[:number])
        other = replace(occlusion, seed=occlusion.seed + 1)
        found = [
            _correlations(originals[each.id], _explain(changed, each, direction, other, texts[each.id]))
            for each in corpus
        ]
        layer = layers[number - 1] if number else ""
        for name in NAMES.values():
            values = np.array([each[name] for each in found])
            rows.append((number, layer, name, *mean_interval(values), len(values)))
    return pd.DataFrame(rows, columns=["randomised", "layer", "map", "value", "low", "high", "n"])


def _written(model: S2TModel, utterance: Utterance, direction: str) -> str:
    """The text that the model writes, or "" if it would be too long for the model once its words are encoded again."""
    text = model.text(model.generate(model.features(utterance.audio())[None], direction)[0])
    room = model.decoding.max_length - len(model.prompt(direction))
    return text if len(model.token_ids(text)) <= room else ""


def _explain(model: S2TModel, utterance: Utterance, direction: str, occlusion: Occlusion, text: str) -> xr.Dataset:
    return explain_directions(model, utterance, [direction], occlusion, text=text)[0]


def _correlations(first: xr.Dataset, second: xr.Dataset) -> dict[str, float]:
    """Pearson's correlation of each map of two datasets, normalised as for rho."""
    attention = [normalised_attention(each.cross_attention.mean(["layer", "head"])).values for each in (first, second)]
    found = {"CA": np.corrcoef(*(each.ravel() for each in attention))[0, 1]}
    for name in ("input_saliency", "encoder_saliency"):
        pair = [normalised_saliency(each[name], each.cross_attention).values.ravel() for each in (first, second)]
        found[NAMES[name]] = np.corrcoef(*pair)[0, 1]
    return found
