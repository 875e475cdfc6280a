"""From a model and a recording to its maps: CA, SM^X and SM^H of the model's own hypothesis."""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import xattn
from xattn.attention import cross_attention
from xattn.audio import WINDOW_SECONDS, mel_centres
from xattn.corpus import Utterance, utterance_from_file
from xattn.models import S2TModel
from xattn.occlusion import Partition, UnitScores, draw_masks, kl_divergence, occlude
from xattn.segments import slic_pyramid


def explain(
    model: S2TModel,
    utterance: Utterance | str | Path,
    target: str | None = None,
    *,
    input_masks: int = 2000,
    encoder_masks: int = 2000,
    input_p: float = 0.5,
    encoder_p: float = 0.7,
    seed: int = 0,
    batch_size: int = 32,
) -> xr.Dataset:
    """Transcribe or translate one recording and explain every token of the output.

    Args:
        model: from `xattn.load_model`.
        utterance: of a corpus, or the path of a recording.
        target: language of the output; by default the utterance's own, or the model's first for a recording.
        input_masks, encoder_masks: numbers of perturbations, N_X and N_H (20,000 each in the paper).
        input_p, encoder_p: probabilities that a segment or a step is hidden (0.5 and 0.7 in the paper).
        seed: together with the utterance's id it fixes every mask.
        batch_size: perturbations computed at once; it affects speed, and the numbers only by rounding.

    Returns:
        cross_attention (layer, head, token, step), input_saliency (token, time, mel) = SM^X, encoder_saliency (token,
        step) = SM^H, SM^X in its compact form (segment_score, segment_count, segmentation), and provenance in the
        attributes. Row i explains token i of the hypothesis; the last token is </s>.

    Raises:
        ValueError: a parameter out of range, a language the model does not write, or an empty hypothesis.
    """
    if not isinstance(utterance, Utterance):
        utterance = utterance_from_file(utterance, language=target or model.languages[0])
    return explain_targets(
        model,
        utterance,
        [target or utterance.language],
        input_masks=input_masks,
        encoder_masks=encoder_masks,
        input_p=input_p,
        encoder_p=encoder_p,
        seed=seed,
        batch_size=batch_size,
    )[0]


def explain_targets(
    model: S2TModel,
    utterance: Utterance,
    targets: list[str],
    *,
    input_masks: int,
    encoder_masks: int,
    input_p: float,
    encoder_p: float,
    seed: int,
    batch_size: int = 32,
) -> list[xr.Dataset]:
    """As `explain`, for several output languages of the same audio, which share the encoder passes."""
    for name, p in (("input_p", input_p), ("encoder_p", encoder_p)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} is {p}, which is no probability: give a number from 0 to 1.")
    started = time.monotonic()
    audio = utterance.audio()
    features = model.features(audio)  # (T, F)
    states = model.encode(features[None])  # (1, S, D)
    hypotheses = [model.generate(features[None], target)[0] for target in targets]
    for target, ids in zip(targets, hypotheses, strict=True):
        if len(ids) < 2:
            raise ValueError(
                f"{model.name} wrote nothing for {utterance.id} in {target!r}: check the recording and its language."
            )
    inputs = [torch.cat([model.prompt(t), ids])[:-1] for t, ids in zip(targets, hypotheses, strict=True)]
    # The prompt may be longer than one token: rows before its last one explain no token of the hypothesis.
    rows = [slice(len(model.prompt(target)) - 1, None) for target in targets]
    original = [model.decode(states, ids)[:, part] for ids, part in zip(inputs, rows, strict=True)]  # (1, I, V) each

    def divergence(perturbed_states: torch.Tensor) -> torch.Tensor:
        scores = [
            kl_divergence(log_p, model.decode(perturbed_states, ids)[:, part])
            for log_p, ids, part in zip(original, inputs, rows, strict=True)
        ]
        return torch.cat(scores, dim=1)  # (B, tokens of all hypotheses)

    spectrogram = Partition.of(slic_pyramid(features.cpu().numpy()))
    input_scores = occlude(
        lambda keep: divergence(model.encode(features * keep)),
        spectrogram,
        draw_masks(spectrogram, input_masks, input_p, seed, f"{utterance.id}/input"),
        batch_size=batch_size,
        device=features.device,
    )
    steps = Partition.of(np.arange(states.shape[1])[None])
    encoder_scores = occlude(
        lambda keep: divergence(states * keep[..., None]),
        steps,
        draw_masks(steps, encoder_masks, encoder_p, seed, f"{utterance.id}/encoder"),
        batch_size=batch_size,
        device=features.device,
    )
    seconds = time.monotonic() - started
    maps, start = [], 0
    for target, ids, decoder_inputs, part in zip(targets, hypotheses, inputs, rows, strict=True):
        own = slice(start, start := start + len(ids))
        attributes = {
            "model": model.name,
            "weights": model.weights_hash,
            "utterance": utterance.id,
            "audio": hashlib.sha256(audio.tobytes()).hexdigest()[:16],
            "setting": target if target == utterance.language else f"{utterance.language}-{target}",
            "hypothesis": model.text(ids),
            "reference": utterance.transcript if target == utterance.language else utterance.translation,
            "subsampling": model.subsampling,
            "input_masks": input_masks,
            "encoder_masks": encoder_masks,
            "input_p": input_p,
            "encoder_p": encoder_p,
            "seed": seed,
            "version": xattn.__version__,
            "seconds": round(seconds / len(targets), 3),
        }
        attention = cross_attention(model, states, decoder_inputs)[:, :, part]
        maps.append(
            labelled(
                model,
                model.tokens(ids),
                attention,
                UnitScores(input_scores.sums[own], input_scores.counts),
                spectrogram,
                UnitScores(encoder_scores.sums[own], encoder_scores.counts).cells(steps.labels),
                attributes,
            )
        )
    return maps


def labelled(
    model: S2TModel,
    tokens: list[str],
    attention: np.ndarray,
    scores: UnitScores,
    spectrogram: Partition,
    encoder_saliency: np.ndarray,
    attributes: dict,
) -> xr.Dataset:
    """The maps of one hypothesis as a dataset with the kit's axes; seconds are those of window centres."""
    frames = spectrogram.labels.shape[1]
    times = WINDOW_SECONDS / 2 + model.frame_seconds * np.arange(frames)
    first = model.subsampling * np.arange(attention.shape[-1])
    last = np.minimum(first + model.subsampling, frames) - 1
    dataset = xr.Dataset(
        {
            "cross_attention": (("layer", "head", "token", "step"), attention),
            "encoder_saliency": (("token", "step"), encoder_saliency),
            "segment_score": (("token", "segment"), scores.sums),
            "segment_count": (("segment",), scores.counts),
            "segmentation": (("level", "time", "mel"), spectrogram.labels),
        },
        coords={
            "layer": 1 + np.arange(attention.shape[0]),
            "head": 1 + np.arange(attention.shape[1]),
            "token": np.array(tokens, dtype=object),
            "step": (times[first] + times[last]) / 2,
            "time": times,
            "mel": mel_centres(),
        },
        attrs=attributes,
    )
    return expand(dataset)


def expand(maps: xr.Dataset) -> xr.Dataset:
    """Add SM^X per cell, input_saliency (token, time, mel), computed from its compact form."""
    saliency = UnitScores(maps.segment_score.values, maps.segment_count.values).cells(maps.segmentation.values)
    return maps.assign(input_saliency=(("token", "time", "mel"), saliency))
