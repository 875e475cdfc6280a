"""From a model and a recording to its maps: CA, SM^X and SM^H of the model's own hypothesis."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import xattn
from xattn.attention import cross_attention
from xattn.audio import FRAME_SECONDS, WINDOW_SECONDS
from xattn.compare import SPECIAL_TOKENS, on_steps
from xattn.corpus import Utterance, utterance_from_file
from xattn.estimators import ESTIMATORS, estimate, expand, reliability
from xattn.models import S2TModel
from xattn.occlusion import Masks, Partition, divergence_from, occlude
from xattn.segments import PYRAMIDS, slic_pyramid
from xattn.store import Checkpoint

VERSION = 6  # of the maps' numbers: raise it with any change that moves them, so that stored maps are made again
PRECISIONS = ("auto", "float32", "bfloat16")
BATCH_SIZES = {"cuda": 128}  # 32 elsewhere


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 rather than emulating it."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Occlusion:
    """How a recording is perturbed.

    input_masks, encoder_masks: numbers of perturbations, N_X and N_H (20,000 each in the paper).
    input_p, encoder_p: probability that a segment, or an encoder step, is hidden (0.5 and 0.7 in the paper).
    seed: together with the utterance's id it fixes every mask.
    precision: of the perturbed passes, "float32", "bfloat16", which takes about 40 % (SM^X) and 30 % (SM^H) off their
        time where the processor has it, or "auto": bfloat16 where the device computes in it. Scores of bfloat16
        correlate with those of float32 at 0.9999 over all tokens together and at 0.9996 for the median token, but at
        down to 0.88 for tokens that hardly depend on the input (mean KL of 0.001 nats). Normalisation brings these out:
        maps, normalised, correlate at 0.98 to 0.99 (SM^X) and 0.998 (SM^H), and a head's rho moves by up to 0.03 and
        0.005 (base, 3 utterances, 200 perturbations); with 20,000, the overall rho moved by up to 0.004 and 0.018.
    estimator: of xattn.estimators, what makes a map of the perturbations' scores: "mean" (the paper's), "sqrt_mean",
        "ridge" or "sqrt_ridge".
    reliability: no more perturbations are made once the maps, normalised and on the encoder's steps, have this
        split-half reliability; 1, which none has, asks for all.
    pyramid: of xattn.segments, which superpixels are hidden: "published" (the paper's), or "spread".
    batch_size: perturbations computed at once, fewer where memory does not suffice; None, 128 on a GPU and 32
        elsewhere. It affects speed, and the numbers only by rounding.
    """

    input_masks: int = 2000
    encoder_masks: int = 2000
    input_p: float = 0.5
    encoder_p: float = 0.7
    seed: int = 0
    precision: str = "auto"
    estimator: str = "mean"
    reliability: float = 1.0
    pyramid: str = "published"
    batch_size: int | None = None

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"There is no precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"There is no estimator {self.estimator!r}: choose one of {', '.join(ESTIMATORS)}.")
        if self.pyramid not in PYRAMIDS:
            raise ValueError(f"There is no pyramid {self.pyramid!r}: choose one of {', '.join(PYRAMIDS)}.")
        for name in ("input_p", "encoder_p", "reliability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 to 1.")
        for name, least in (("input_masks", 1), ("encoder_masks", 1), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}.")
            object.__setattr__(self, name, int(value))  # numpy's would not do in the key of stored maps

    def on(self, device: torch.device) -> "Occlusion":
        """The same with precision "auto" and batch_size None decided for the device."""
        precision, batch_size = self.precision, self.batch_size or BATCH_SIZES.get(device.type, 32)
        if precision == "auto":
            precision = "bfloat16" if has_bfloat16(device) else "float32"
        return replace(self, precision=precision, batch_size=batch_size)


class NothingToExplain(ValueError):
    """There is nothing to explain: the model wrote fewer tokens than are needed, or cannot hear so long a recording."""


def explain(
    model: S2TModel,
    utterance: Utterance | str | Path,
    target: str | None = None,
    language: str | None = None,
    **occlusion: float,
) -> xr.Dataset:
    """Transcribe or translate one recording and explain every token of the output.

    Args:
        model: from `xattn.load_model`.
        utterance: of a corpus, or the path of a recording.
        target: language of the output; by default the one that is spoken.
        language: the language spoken in a recording; by default the target, or the model's first.
        occlusion: the fields of `Occlusion`, such as input_masks=500.

    Returns:
        cross_attention (layer, head, token, step); input_saliency (token, time, mel) = SM^X; encoder_saliency (token,
        step) = SM^H; the model's input as features (time, mel); SM^X in its compact form (segment_score,
        segment_count, segmentation); every perturbation's score (input_scores, encoder_scores); and provenance in the
        attributes. Row i explains token i of the hypothesis, whose last token is </s>. Frames and steps are those of
        the recording: of a model that pads it (Whisper), a row of cross_attention sums to 1 together with what is left
        on the padding, padding_attention (layer, head, token).

    Raises:
        ValueError: a parameter out of range, a language the model does not write, or an empty hypothesis.
    """
    if not isinstance(utterance, Utterance):
        spoken = language or target or next(iter(model.languages), None)
        if spoken is None:
            raise ValueError(f"{model.name} does not say which language it writes: give it as target, such as 'en'.")
        utterance = utterance_from_file(utterance, language=spoken)
    return explain_targets(model, utterance, [target or utterance.language], Occlusion(**occlusion))[0]


@dataclass(frozen=True)
class Hypothesis:
    """What the model wrote of an utterance in one setting of the paper, "en" or "en-it".

    ids: (I,), the tokens up to </s>, and their strings; decoder_inputs: (P + I - 1,), the prompt of P tokens, then
    they, but for the last; rows: of the decoder positions that predict them; columns: theirs among the tokens of all
    hypotheses of the utterance.
    """

    setting: str
    ids: torch.Tensor
    tokens: list[str]
    decoder_inputs: torch.Tensor
    rows: slice
    columns: slice


def write_hypotheses(
    model: S2TModel, features: torch.Tensor, settings: Sequence[str], name: str, least: int
) -> list[Hypothesis]:
    """The outputs for features (T, F); NothingToExplain: one of utterance `name` has fewer than `least` tokens."""
    found, start = [], 0
    for setting in settings:
        ids, prompt = model.generate(features[None], setting)[0], model.prompt(setting)
        if len(ids) <= least:
            raise NothingToExplain(
                f"{model.name} wrote {model.text(ids) or 'nothing'} for {name} in {setting!r}: check the recording and "
                "its language."
            )
        inputs, rows = torch.cat([prompt, ids])[:-1], slice(len(prompt) - 1, None)
        found.append(Hypothesis(setting, ids, model.tokens(ids), inputs, rows, slice(start, start + len(ids))))
        start += len(ids)
    return found


def explain_targets(
    model: S2TModel,
    utterance: Utterance,
    targets: Sequence[str],
    occlusion: Occlusion,
    least: int = 1,
    checkpoint: Checkpoint | None = None,
) -> list[xr.Dataset]:
    """As `explain`, for several output languages of the same audio, which share the encoder passes.

    NothingToExplain: a hypothesis has fewer than `least` tokens before its </s>.
    """
    started = time.monotonic()
    occlusion = occlusion.on(model.device)
    audio = utterance.audio()
    features = model.features(audio)  # (T, F)
    states = model.encode(features[None])  # (1, S, D)
    source = utterance.language
    settings = [target if target == source else f"{source}-{target}" for target in targets]
    hypotheses = write_hypotheses(model, features, settings, utterance.id, least)
    partitions = {
        "input": Partition.of(slic_pyramid(features.cpu().numpy(), pyramid=occlusion.pyramid)),
        "encoder": Partition.of(np.arange(model.steps(len(features)))[None]),
    }
    masks = {
        place: Masks(
            partition,
            getattr(occlusion, f"{place}_masks"),
            getattr(occlusion, f"{place}_p"),
            occlusion.seed,
            f"{utterance.id}/{place}",
        )
        for place, partition in partitions.items()
    }
    scores = score_perturbations(model, features, states, hypotheses, masks, occlusion, checkpoint)
    attributes = {
        "model": model.name,
        "weights": model.weights_hash,
        "utterance": utterance.id,
        "audio": hashlib.sha256(audio.tobytes()).hexdigest()[:16],
        "subsampling": model.subsampling,
        "lead": model.lead,
        **asdict(occlusion),
        "version": xattn.__version__,
        "seconds": round((time.monotonic() - started) / len(targets), 3),
    }
    maps = []
    for each in hypotheses:
        own = {
            "setting": each.setting,
            "hypothesis": model.text(each.ids),
            "reference": utterance.text(each.setting),
        }
        attention = cross_attention(model, states, each.decoder_inputs)[:, :, each.rows]
        columns = {place: score[:, each.columns] for place, score in scores.items()}
        maps.append(labelled(model, features, each.tokens, attention, columns, masks, attributes | own))
    return maps


def score_perturbations(
    model: S2TModel,
    features: torch.Tensor,
    states: torch.Tensor,
    hypotheses: list[Hypothesis],
    masks: dict[str, Masks],
    occlusion: Occlusion,
    checkpoint: Checkpoint | None,
) -> dict[str, np.ndarray]:
    """KL divergences (N, tokens of all hypotheses) of the perturbations of "input" and of "encoder"."""

    def reliable(place: str, scores: np.ndarray) -> bool:
        return all(
            map_reliability(scores[:, each.columns], masks[place], each.tokens, model, occlusion.estimator)
            >= occlusion.reliability
            for each in hypotheses
        )

    with torch.autocast(features.device.type, torch.bfloat16, enabled=occlusion.precision == "bfloat16"):
        divergences = [divergence_from(model.decode(states, each.decoder_inputs)[0, each.rows]) for each in hypotheses]

        def divergence(decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            pairs = zip(divergences, hypotheses, strict=True)
            return torch.cat([own(decode(each.decoder_inputs)[:, each.rows]) for own, each in pairs], dim=1)

        decode_without_steps = model.decoder_without_steps(states)
        perturbed = {
            "input": lambda keep: divergence(partial(model.decode, model.encode(model.without_cells(features, keep)))),
            "encoder": lambda keep: divergence(partial(decode_without_steps, keep)),
        }
        return {
            place: occlude(
                perturbed[place],
                masks[place],
                batch_size=occlusion.batch_size,
                device=features.device,
                done=checkpoint.scores.get(place) if checkpoint else None,
                checkpoint=partial(checkpoint.save, place) if checkpoint else None,
                enough=partial(reliable, place) if occlusion.reliability < 1 else None,
            )
            for place in masks
        }


def map_reliability(scores: np.ndarray, masks: Masks, tokens: list[str], model: S2TModel, estimator: str) -> float:
    """Reliability of the map that attention is compared with: normalised, on the encoder's steps, spoken tokens only.

    scores: (N, I), of the tokens (I,) of one hypothesis.
    """
    steps = model.steps(masks.partition.labels.shape[1])  # a map of steps needs no reduction
    reduced = partial(on_steps, steps=steps, window=model.subsampling, lead=model.lead)
    return reliability(scores[:, ~np.isin(tokens, SPECIAL_TOKENS)], masks, estimator, reduced)


def labelled(
    model: S2TModel,
    features: torch.Tensor,
    tokens: list[str],
    attention: np.ndarray,
    scores: dict[str, np.ndarray],
    masks: dict[str, Masks],
    attributes: dict,
) -> xr.Dataset:
    """The maps of one hypothesis as a dataset with the kit's axes."""
    frames, steps = len(features), model.steps(len(features))
    times = frame_times(frames, model.first_frame, model.frame_seconds)
    attention, beyond, padding = attention[..., :steps], attention[..., steps:], {}
    if beyond.shape[-1]:
        padding["padding_attention"] = (("layer", "head", "token"), beyond.sum(axis=-1))
    estimator = attributes["estimator"]
    units = {place: estimate(each, masks[place], estimator) for place, each in scores.items()}
    reliabilities = {
        f"{place}_reliability": map_reliability(each, masks[place], tokens, model, estimator)
        for place, each in scores.items()
    }
    dataset = xr.Dataset(
        {
            "cross_attention": (("layer", "head", "token", "step"), attention),
            **padding,
            "encoder_saliency": (("token", "step"), units["encoder"].cells(masks["encoder"].partition.labels)),
            "features": (("time", "mel"), features.cpu().numpy()),
            "input_scores": (("input_mask", "token"), scores["input"]),
            "encoder_scores": (("encoder_mask", "token"), scores["encoder"]),
            **units["input"].compact(),
            "segmentation": (("level", "time", "mel"), masks["input"].partition.labels),
        },
        coords=coordinates(tokens, attention, times, model.subsampling, model.lead) | {"mel": model.band_centres},
        attrs=attributes | reliabilities,
    )
    return expand(dataset)


def frame_times(frames: int, first: float = WINDOW_SECONDS / 2, frame_seconds: float = FRAME_SECONDS) -> np.ndarray:
    """Seconds (T,) at the centres of the windows of frames, the first of which is given."""
    return first + frame_seconds * np.arange(frames)


def coordinates(
    tokens: Sequence[str], attention: np.ndarray, times: np.ndarray, subsampling: int, lead: int = 0
) -> dict:
    """Of the kit's axes but mel, for the tokens (I,), attention (L, H, I, S) and `frame_times` (T,) of an utterance.

    A step's seconds are in the middle of its `subsampling` frames, of which the first step may have `lead` fewer, and
    the last one fewer too.
    """
    first = subsampling * np.arange(attention.shape[-1]) - lead
    last = np.minimum(first + subsampling, len(times)) - 1
    return {
        "layer": 1 + np.arange(attention.shape[0]),
        "head": 1 + np.arange(attention.shape[1]),
        "token": np.array(tokens, dtype=object),
        "step": (times[np.maximum(first, 0)] + times[last]) / 2,
        "time": times,
    }
