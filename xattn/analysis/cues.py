"""Quantities that cost nothing beside the transcript, and what they say about the attention."""

import numpy as np
import torch
import xarray as xr

from xattn.analysis.normalisation import standardise_over_tokens
from xattn.attribution.attention import entropies
from xattn.attribution.forced import Forced
from xattn.maps import drop_special_tokens, padding_share


def cues(maps: xr.Dataset, forced: Forced | None = None) -> dict[str, float]:
    """Cues of one utterance from its attention, its features and, if `forced` is given, one forced pass.

    Tokens without </s> count. Attention is averaged over layers and heads unless said otherwise.

    Returns:
        entropy: of each head's weights on the recording, averaged over all heads, relative to uniform weights;
        peakedness: the highest weight of a token, averaged over tokens;
        disagreement: 1 - the mean correlation of a head with the average, both standardised over tokens;
        order: the share of tokens whose highest standardised weight does not come before the previous token's;
        padding: the share of attention on padding; 0 for a model that does not pad its input;
        level range: from the 10th to the 90th percentile of the frames' mean level, in units of the features;
        tokens per second;
        confidence: the mean log-probability of the tokens, in nats; only with `forced`.
    """
    spoken = drop_special_tokens(maps)
    attention = spoken.cross_attention.transpose("layer", "head", "token", "step").values
    average = standardise_over_tokens(attention.mean(axis=(0, 1)))
    heads = standardise_over_tokens(attention).reshape(-1, average.size)
    varying = heads[np.ptp(heads, axis=1) > 0]
    agreement = [np.corrcoef(head, average.ravel())[0, 1] for head in varying] if np.ptp(average) > 0 else []
    peaks, level = average.argmax(axis=1), maps.features.mean("mel").values
    low, high = np.percentile(level, [10, 90])
    seconds = float(maps.step_end[-1] - maps.step_start[0])
    found = {
        "entropy": float(entropies(spoken.cross_attention).mean()),
        "peakedness": float(attention.mean(axis=(0, 1)).max(axis=1).mean()),
        "disagreement": 1 - float(np.mean(agreement)) if agreement else 1.0,
        "order": float(np.mean(np.diff(peaks) >= 0)) if len(peaks) > 1 else 1.0,
        "padding": padding_share(maps) if "padding_attention" in maps else 0.0,
        "level range": float(high - low),
        "tokens per second": spoken.sizes["token"] / seconds,
    }
    if forced is not None:
        with torch.inference_mode():
            log_p = forced.model.decode(forced.encode(forced.features), forced.decoder_inputs)
            found["confidence"] = float(forced.values(log_p)[0, :-1].mean())
    return found


IN_ORDER = 0.7  # share of tokens in order, below which a transcript is hardly that of the recording


def attention_suffices(maps: xr.Dataset, reliability: float = 0.9) -> str:
    """Say whether attention is enough for this utterance, what it is unlikely to show, and what a check would cost.

    The rule is what the notebook 44_sufficiency measured: attention that does not move forward with a transcript
    belongs to a text that is not in the recording. No cue predicts, for a new model, how far attention agrees with
    saliency, so nothing is said about that.

    Args:
        maps: from `xattn.explain`.
        reliability: of the saliency map whose cost is stated, below 1.
    """
    order = cues(maps)["order"]
    if "-" in maps.setting:
        first = (
            "Attention shows roughly where a translated word comes from; it agrees less with saliency than for a "
            "transcript."
        )
    elif order < IN_ORDER:
        first = (
            f"Attention is not enough: only {order:.0%} of the tokens attend at or after the previous token, so parts "
            "of the text may not be in the recording."
        )
    else:
        first = "Attention is enough to tell when each word was spoken (xattn.word_times)."
    second = "Attention does not show frequency bands, details within a word, or what earlier words contribute."
    found, masks = float(maps.attrs.get("input_reliability", np.nan)), maps.sizes.get("input_mask", 0)
    if not (masks and 0 < found < 1):
        return f"{first} {second}"
    factor = reliability / (1 - reliability) * (1 - found) / found  # Spearman and Brown
    return (
        f"{first} {second} Saliency with a reliability of {reliability:g} needs about {masks * factor:,.0f} masks of "
        f"this kind, {max(1, round(maps.seconds * factor / 60))} min on the machine that made these maps."
    )
