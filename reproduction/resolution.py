"""How rho depends on the resolution in time, and how much of each head's attention falls on padding."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from xattn.analysis.correlation import normalised_saliency, saliencies_of
from xattn.analysis.intervals import mean_interval
from xattn.analysis.normalisation import standardise_over_tokens
from xattn.maps import drop_special_tokens


def rho_by_width(stored: Iterable[xr.Dataset], widths: Sequence[int]) -> pd.DataFrame:
    """rho, as measured, of maps that are averaged over so many neighbouring steps first.

    Attention, averaged over layers and heads, is averaged over blocks of steps and then standardised over tokens.
    Saliency is normalised and reduced to steps as usual and then averaged. So blocks of one step give the usual rho. An
    incomplete block at the end is left out.

    Returns:
        A long table: model, direction, saliency ("input", "encoder"), steps, seconds (of a block), value (the mean over
        utterances), low, high (95 %), reliability (of the whole map), n. Utterances with fewer than two blocks are left
        out.
    """
    rows = []
    for item in map(drop_special_tokens, stored):
        attention = item.cross_attention.mean(["layer", "head"]).values
        seconds = float(item.step_end[0] - item.step_start[0])
        for name in saliencies_of(item):
            saliency = normalised_saliency(item[name], item).values
            for width in widths:
                if attention.shape[1] < 2 * width:
                    continue
                first, second = (_blocks(each, width) for each in (attention, saliency))
                rho = np.corrcoef(standardise_over_tokens(first).ravel(), second.ravel())[0, 1]
                kind = name.removesuffix("_saliency")
                reliability = item.attrs[f"{kind}_reliability"]
                rows.append((item.model, item.setting, kind, width, round(width * seconds, 3), rho, reliability))
    keys = ["model", "direction", "saliency", "steps", "seconds"]
    groups = pd.DataFrame(rows, columns=[*keys, "rho", "reliability"]).groupby(keys, sort=False)
    found = [(*key, *mean_interval(part.rho), part.reliability.mean(), len(part)) for key, part in groups]
    return pd.DataFrame(found, columns=[*keys, "value", "low", "high", "reliability", "n"])


def _blocks(cells: np.ndarray, width: int) -> np.ndarray:
    """Means of blocks of `width` neighbouring columns: (token, step // width)."""
    blocks = cells.shape[1] // width
    return cells[:, : blocks * width].reshape(len(cells), blocks, width).mean(axis=2)


def padding_by_head(stored: Iterable[xr.Dataset]) -> pd.DataFrame:
    """The share of each head's attention on the padding, averaged over tokens, then over utterances.

    Returns:
        A table with a row for each layer and a column for each head; empty for a model that does not pad its input.
    """
    shares = [
        drop_special_tokens(item).padding_attention.mean("token") for item in stored if "padding_attention" in item
    ]
    if not shares:
        return pd.DataFrame()
    return xr.concat(shares, "utterance").mean("utterance").to_pandas()
