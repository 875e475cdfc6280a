"""From a model and a recording to its maps: CA, SM^X and SM^H of the model's hypothesis."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from os import PathLike, fspath

import numpy as np
import platformdirs
import torch
import xarray as xr
from tqdm import tqdm

from xattn.analysis.reliability import LOW, half_maps, split_half_reliability
from xattn.attribution.attention import cross_attention
from xattn.attribution.estimators import estimate
from xattn.attribution.occlusion import Masks, Partition, divergence_from, kl_divergence, occlude
from xattn.attribution.segments import WINDOWS, partition
from xattn.attribution.settings import Occlusion, check_memory, fitting_batch
from xattn.audio import Recording
from xattn.data.utterance import Utterance, utterance_from_recording
from xattn.maps import SPECIAL_TOKENS, build, frame_times, padding_share, shifted
from xattn.models import Decoding, S2TModel
from xattn.models.errors import NothingToExplain
from xattn.store import Checkpoint, key_of

VERSION = 7  # of the maps' numbers: raise it with any change that moves them, so that stored maps are made again
FIRST_LOOK = {"reliability": 0.6, "seconds": 120}
INPUT_SHARE = 0.75  # of a time limit
# Nats per token. With nothing but noise, tones or music, base stays below in 85 % of 40 clips and Whisper tiny.en in
# all; base is above for 39 of 40 test utterances; tiny.en has at least 2.8 for 20 of LibriSpeech's test-other.
HARDLY = 0.9
PLACES = {"input": "SM^X", "encoder": "SM^H"}  # where perturbations hide something, and the map that results
# Libraries that determine the numbers of a map. The second group entered the keys of stored maps later: a version
# listed here adds nothing to a key, so maps from before stay valid.
LIBRARIES = ("torch", "transformers", "scikit-image", "numpy")
LATER_LIBRARIES = {"kaldi-native-fbank": "1.22.5", "scipy": "1.17.1", "soundfile": "0.14.0", "av": "18.1.0"}


def explain(
    model: S2TModel,
    audio: Recording | Utterance,
    *,
    rate: int | None = None,
    channel: int | None = None,
    language: str | None = None,
    translate_to: str | None = None,
    text: str | None = None,
    occlusion: Occlusion | None = None,
    decoding: Decoding | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Transcribe or translate one recording and explain every token of the output.

    An interrupted call leaves its scores in the user's cache; the same call resumes with them.

    Args:
        model: from `xattn.load_model`.
        audio: a path, samples with `rate`, `(rate, samples)`, `{"array", "sampling_rate"}`, an open file (see
            `xattn.audio.load_audio`), or an Utterance, such as one of `xattn.cut_at_pauses`.
        rate: the rate of the samples in Hz.
        channel: the channel of the recording to use, counted from 0, instead of the average of all.
        language: the spoken language. If it is not given, it is detected if the model can do that; otherwise the
            model's default is used and printed.
        translate_to: the language of the output; by default the spoken one.
        text: explain this text instead of the model's own hypothesis.
        occlusion: number and kind of perturbations; by default windows of time until the maps have a reliability of
            0.6, for at most two minutes.
        decoding: settings of the search that differ from the model's own.
        progress: whether to print the language, the transcript, the time left and the reliability of the maps.

    Returns:
        A dataset with the axes of `xattn.maps`: cross_attention (layer, head, token, step); input_saliency (token,
        time, mel), SM^X; encoder_saliency (token, step), SM^H; the model's input, features (time, mel); the scores of
        all perturbations, input_scores and encoder_scores; and the superpixels (segmentation). Row i explains token i
        of the hypothesis, whose last token is </s>. For a model that pads its input (Whisper), frames and steps cover
        the recording only, and padding_attention (layer, head, token) is the attention that falls on the padding.
        The times of a part of a recording are those of the whole. Attributes hold the hypothesis, the reliability of
        both maps (`input_reliability`, `encoder_reliability`), the divergence if everything is hidden
        (`hidden_divergence`, nats per token), the path of the recording if `audio` is one (`recording`) and provenance.
        To keep the dataset, write it with its `to_netcdf`.

    Raises:
        ValueError: a parameter is out of range, the model does not support the language, it wrote nothing, the text is
            empty or too long for it, or the recording is too long for it or for the free memory.
        OSError, TypeError: see `xattn.audio.load_audio`; occlusion is of another type.
    """
    say = partial(print, flush=True) if progress else _nothing
    if channel is not None and isinstance(audio, Utterance):
        raise ValueError(
            "channel does not apply to an Utterance, which names its own: leave it out, or give the recording itself."
        )
    utterance = audio if isinstance(audio, Utterance) else utterance_from_recording(audio, rate, channel=channel)
    samples = utterance.audio()
    features = model.features(samples)
    language = _spoken_language(model, features, language or utterance.language, translate_to, say)
    utterance = replace(utterance, language=language, samples=samples)
    if not isinstance(occlusion, Occlusion | None):
        raise TypeError(f"occlusion is {occlusion!r}: give an xattn.Occlusion, such as Occlusion(partition='windows').")
    asked = occlusion or Occlusion(**FIRST_LOOK)
    occlusion = asked.on(model)
    origin = determinants(model, samples.tobytes(), utterance.id, occlusion)
    key = key_of(
        origin | {"language": language, "translate_to": translate_to, "text": text, "decoding": repr(decoding)}
    )
    checkpoint = Checkpoint(platformdirs.user_cache_path("xattn") / f"{key}.npz", key)
    (maps,) = explain_directions(
        model,
        utterance,
        [direction_of(language, translate_to)],
        occlusion,
        text=text,
        decoding=decoding,
        checkpoint=checkpoint,
        progress=progress,
    )
    checkpoint.remove()
    if isinstance(audio, str | PathLike):
        maps.attrs["recording"] = fspath(audio)
    _report(maps, asked, say)
    return maps


def reliabilities(maps: xr.Dataset) -> str:
    """The reliability of both maps and their numbers of masks as text."""
    found = {name: (maps.attrs[f"{place}_reliability"], maps.sizes[f"{place}_mask"]) for place, name in PLACES.items()}
    return ", ".join(
        f"{name} {'unknown' if np.isnan(value) else f'{value:.2f}'} ({masks:,} masks)"
        for name, (value, masks) in found.items()
    )


def _report(maps: xr.Dataset, occlusion: Occlusion, say: Callable) -> None:
    """Say whether the output depends on the recording, how reliable the maps are, and what windows do not show.

    occlusion: as the caller gave it, for the advice what to change.
    """
    if maps.hidden_divergence < HARDLY:
        say(
            f"What {maps.model} wrote hardly depends on this recording ({maps.hidden_divergence:.2f} nats per token; "
            f"speech that it can transcribe usually gives more than {HARDLY}): it may hold no speech, or speech unlike "
            "the model's training data. Maps of such an output look plausible and explain nothing."
        )
    if "padding_attention" in maps:
        say(f"{padding_share(maps):.0%} of the cross-attention falls on the padding beyond the recording.")
    say(f"Reliability: {reliabilities(maps)}")
    found = {place: maps.attrs[f"{place}_reliability"] for place in PLACES}
    noisy = [place for place, value in found.items() if not value >= LOW]  # NaN is not reliable either
    if noisy:
        more = {name: getattr(occlusion, name) for name in _changed(occlusion)}
        for place in noisy:
            name, value = _allowance(place, maps.sizes[f"{place}_mask"], found[place], occlusion)
            more[name] = max(value, more[name]) if name == "seconds" else value
        options = ", ".join(f"{name}={value!r}" for name, value in more.items())
        state = "below" if all(found[place] < LOW for place in noisy) else "unknown or below"
        say(f"A map with a reliability {state} {LOW} can be mostly noise: try occlusion=Occlusion({options}).")
    elif occlusion.seconds and occlusion.reliability < 1:
        short = {name: found[place] for place, name in PLACES.items() if found[place] < occlusion.reliability}
        if short:
            seconds = _times(min(short.values()), occlusion.reliability) * occlusion.seconds
            say(
                f"The time limit of {occlusion.seconds:g} s ended before {' and '.join(short)} reached a reliability "
                f"of {occlusion.reliability:g}: occlusion=Occlusion(seconds={seconds:g}) allows more masks."
            )
    if occlusion.partition == "windows":
        say(
            f"SM^X comes from windows of {min(WINDOWS)} s and longer: it is coarse in time and silent about frequency. "
            'occlusion=Occlusion(partition="superpixels") shows both, with many more masks.'
        )


def _changed(occlusion: Occlusion) -> list[str]:
    """The fields that differ from their defaults."""
    return [field.name for field in fields(occlusion) if getattr(occlusion, field.name) != field.default]


def _allowance(place: str, masks: int, reliability: float, occlusion: Occlusion) -> tuple[str, float]:
    """The field of Occlusion that keeps the map of a place from being reliable, and a better value."""
    if getattr(occlusion, f"{place}_p") in (0, 1):  # all perturbations are the same
        return f"{place}_p", getattr(Occlusion, f"{place}_p")
    most = getattr(occlusion, f"{place}_masks")
    times = _times(reliability, FIRST_LOOK["reliability"])
    if masks == most:
        return f"{place}_masks", times * most
    if reliability >= occlusion.reliability:
        return "reliability", Occlusion.reliability
    return "seconds", times * occlusion.seconds


def _times(reliability: float, target: float) -> int:
    """How many times as many masks reach the target, by the Spearman-Brown formula.

    10 if the present reliability is no guide; at most 100, as low reliabilities are uncertain.
    """
    if not reliability > 0:
        return 10
    return min(100, math.ceil(target * (1 - reliability) / (reliability * (1 - target))))


def _nothing(*_) -> None:
    pass


def direction_of(language: str, translate_to: str | None) -> str:
    """The direction "en" (transcription) or "en-it" (translation)."""
    return language if translate_to in (None, language) else f"{language}-{translate_to}"


def known_reference(utterance: Utterance, direction: str) -> str:
    """The text that a model should write, or "" if the utterance has none in that language; maps do not need it."""
    try:
        return utterance.text(direction)
    except ValueError:
        return ""


def _spoken_language(
    model: S2TModel, features: torch.Tensor, language: str, translate_to: str | None, say: Callable
) -> str:
    """The language given, detected or assumed. ValueError: the model does not support it, or it is unknown."""
    if not language and model.detects_language:
        language = model.detect_language(features)
        say(f"Language: {language} (detected)")
    if not language:
        spoken = [each for each in model.languages if each != translate_to] or model.languages
        language = next(iter(spoken), translate_to)
        if not language:
            raise ValueError(f"{model.name} does not say which language it writes: give language, such as 'en'.")
        only = len(model.languages) == 1
        say(
            f"Language: {language} (the {'only one' if only else 'default'} of {model.name}"
            f"{'' if only else '; set language= to change it'})"
        )
    # A translation model need not write the language that it understands; `prompt` checks directions.
    if translate_to in (None, language) and model.languages and language not in model.languages:
        raise ValueError(f"{model.name} does not support {language!r}: choose one of {', '.join(model.languages)}.")
    return language


def determinants(model: S2TModel, audio: bytes, utterance: str, occlusion: Occlusion) -> dict:
    """Everything that determines the numbers of an utterance's maps in any direction, as JSON values."""
    versions = {name: version(name) for name in LIBRARIES}
    versions |= {name: version(name) for name, first in LATER_LIBRARIES.items() if version(name) != first}
    return asdict(replace(occlusion, batch_size=1)) | {  # the batch size changes numbers only by rounding
        "weights": model.weights_hash,
        "audio": hashlib.sha256(audio).hexdigest(),
        "utterance": utterance,
        "version": VERSION,
        "versions": versions,
    }


@dataclass(frozen=True)
class Hypothesis:
    """What the model wrote for an utterance in one direction.

    ids: (I,), the tokens up to </s>; tokens: their strings.
    decoder_inputs: (P + I - 1,), the prompt of P tokens and all ids but the last.
    rows: the decoder positions that predict the ids.
    columns: where the tokens are among the tokens of all hypotheses of the utterance.
    """

    direction: str
    ids: torch.Tensor
    tokens: list[str]
    decoder_inputs: torch.Tensor
    rows: slice
    columns: slice


def _hypotheses(
    model: S2TModel,
    features: torch.Tensor,
    directions: Sequence[str],
    name: str,
    text: str | None,
    decoding: Decoding | None,
    least: int,
) -> list[Hypothesis]:
    """Decode features (T, F), or force a text.

    NothingToExplain: a hypothesis has fewer than `least` tokens. ValueError: the text is empty or too long.
    """
    found, start = [], 0
    for direction in directions:
        prompt = model.prompt(direction)
        if text is None:
            ids = model.generate(features[None], direction, decoding=decoding)[0]
        else:
            ids = _forced(model, text, len(prompt))
        if len(ids) <= least:
            raise NothingToExplain(
                f"{model.name} wrote {model.text(ids) or 'nothing'} for {name} in {direction!r}: check the recording "
                "and its language."
            )
        inputs, rows = torch.cat([prompt, ids])[:-1], slice(len(prompt) - 1, None)
        found.append(Hypothesis(direction, ids, model.tokens(ids), inputs, rows, slice(start, start + len(ids))))
        start += len(ids)
    return found


def _forced(model: S2TModel, text: str, prompt: int) -> torch.Tensor:
    """Token ids of a text, after a prompt of so many tokens. ValueError: it is empty, or too long for the model."""
    if not text.strip():
        raise ValueError("The text is empty: give the words to explain, or leave out text.")
    ids, most = model.token_ids(text), model.decoding.max_length - prompt
    if len(ids) > most:
        raise ValueError(
            f"The text has {len(ids)} tokens, but {model.name} writes at most {most}: give a shorter text."
        )
    return ids


@torch.inference_mode()
def explain_directions(
    model: S2TModel,
    utterance: Utterance,
    directions: Sequence[str],
    occlusion: Occlusion,
    *,
    text: str | None = None,
    decoding: Decoding | None = None,
    least: int = 1,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> list[xr.Dataset]:
    """Explain an utterance in several directions, which share the encoder's passes; see `explain`.

    NothingToExplain: a hypothesis has fewer than `least` tokens before its </s>.
    """
    started = time.monotonic()
    occlusion = occlusion.on(model)
    audio = utterance.audio()
    features = model.features(audio)  # (T, F)
    check_memory(model, features, utterance.id)
    states = model.encode(features[None])  # (1, S, D)
    hypotheses = _hypotheses(model, features, directions, utterance.id, text, decoding, least)
    batch = fitting_batch(model, len(features), hypotheses[-1].columns.stop, occlusion.batch_size)
    occlusion = replace(occlusion, batch_size=batch)
    if progress:
        for each in hypotheses:
            print(f"{'Translation' if '-' in each.direction else 'Transcript'}: {model.text(each.ids)}", flush=True)
    step_frames = model.step_frames(len(features))
    partitions = {
        "input": Partition.of(partition(features.cpu().numpy(), occlusion.partition, model.frame_seconds)),
        "encoder": Partition.of(np.arange(len(step_frames))[None]),
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
    scores = _score_perturbations(model, features, states, hypotheses, masks, occlusion, checkpoint, progress)
    attributes = {
        "model": model.name,
        "weights": model.weights_hash,
        "utterance": utterance.id,
        "audio": hashlib.sha256(audio.tobytes()).hexdigest()[:16],
        **asdict(occlusion),
        "version": version("xattn"),
        "seconds": round((time.monotonic() - started) / len(directions), 3),
        "forced": int(text is not None),
    }
    hidden = model.encode(model.mask_input(features, torch.zeros_like(features)[None]))
    maps = []
    for each in hypotheses:
        own = {
            "setting": each.direction,
            "hypothesis": model.text(each.ids),
            "reference": known_reference(utterance, each.direction),
            "hidden_divergence": _mean_divergence(model, states, hidden, each),
        }
        attention = cross_attention(model, states, each.decoder_inputs)[:, :, each.rows]
        columns = {place: score[:, each.columns] for place, score in scores.items()}
        dataset = _dataset(model, features, each.tokens, attention, columns, masks, attributes | own)
        maps.append(dataset if utterance.end is None else shifted(dataset, utterance.start))
    return maps


def _score_perturbations(
    model: S2TModel,
    features: torch.Tensor,
    states: torch.Tensor,
    hypotheses: list[Hypothesis],
    masks: dict[str, Masks],
    occlusion: Occlusion,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> dict[str, np.ndarray]:
    """KL divergences (N, tokens of all hypotheses) for the perturbations of "input" and of "encoder"."""
    step_frames = model.step_frames(len(features))

    def reliable(place: str, scores: np.ndarray) -> bool:
        return all(
            _reliability(
                half_maps(scores[:, each.columns], masks[place], step_frames, occlusion.estimator), each.tokens
            )
            >= occlusion.reliability
            for each in hypotheses
        )

    started, limits = time.monotonic(), {"input": INPUT_SHARE, "encoder": 1.0}
    scores = {}
    with model.perturbing(occlusion.precision) as model:
        divergences = [divergence_from(model.decode(states, each.decoder_inputs)[0, each.rows]) for each in hypotheses]

        def divergence(decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            pairs = zip(divergences, hypotheses, strict=True)
            return torch.cat([own(decode(each.decoder_inputs)[:, each.rows]) for own, each in pairs], dim=1)

        masked_decoder = model.masked_decoder(states)
        perturbed = {
            "input": lambda keep: divergence(partial(model.decode, model.encode(model.mask_input(features, keep)))),
            "encoder": lambda keep: divergence(partial(masked_decoder, keep)),
        }
        for place in masks:
            until = occlusion.seconds and started + limits[place] * occlusion.seconds
            with _bar(place, masks[place].number, until) if progress else nullcontext() as bar:
                scores[place] = occlude(
                    perturbed[place],
                    masks[place],
                    batch_size=occlusion.batch_size * (model.decoder_factor if place == "encoder" else 1),
                    device=features.device,
                    done=checkpoint.scores.get(place) if checkpoint else None,
                    checkpoint=partial(checkpoint.save, place) if checkpoint else None,
                    enough=partial(reliable, place) if occlusion.reliability < 1 else None,
                    until=until,
                    progress=(lambda count, bar=bar: bar.update(count - bar.n)) if progress else None,
                )
                if progress:  # a run that stopped early is complete
                    bar.total = len(scores[place])
                    bar.update(bar.total - bar.n)
    return scores


def _mean_divergence(model: S2TModel, states: torch.Tensor, others: torch.Tensor, hypothesis: Hypothesis) -> float:
    """Mean KL divergence in nats from states to others (1, S, D), over the tokens without </s>."""
    log_p, log_q = (model.decode(each, hypothesis.decoder_inputs)[0, hypothesis.rows] for each in (states, others))
    divergence = kl_divergence(log_p, log_q)
    return float((divergence[:-1] if len(divergence) > 1 else divergence).mean())


def _reliability(halves: np.ndarray | None, tokens: list[str]) -> float:
    """Reliability of a map as it is correlated with attention, that is without special tokens."""
    return split_half_reliability(None if halves is None else halves[:, ~np.isin(tokens, SPECIAL_TOKENS)])


def _bar(place: str, number: int, until: float | None) -> tqdm:
    """A line with the time left that updates in place, often in a terminal and rarely in a log.

    until: the time of `time.monotonic` at which masking stops; the line then gives the longest time that it can take.
    """
    interval, form = 0.2 if sys.stdout.isatty() else 2.0, None
    if until:
        most = tqdm.format_interval(max(0, until - time.monotonic()))
        form = f"{{desc}}: {{n_fmt}} masks in {{elapsed}}, at most {most}"
    return tqdm(total=number, desc=PLACES[place], unit=" masks", file=sys.stdout, mininterval=interval, bar_format=form)


def _dataset(
    model: S2TModel,
    features: torch.Tensor,
    tokens: list[str],
    attention: np.ndarray,
    scores: dict[str, np.ndarray],
    masks: dict[str, Masks],
    attributes: dict,
) -> xr.Dataset:
    """Turn the attention and the scores of one hypothesis into its maps."""
    estimator, step_frames = attributes["estimator"], model.step_frames(len(features))
    units = {place: estimate(each, masks[place], estimator) for place, each in scores.items()}
    halves = {place: half_maps(each, masks[place], step_frames, estimator) for place, each in scores.items()}
    attributes = attributes | {f"{place}_reliability": _reliability(each, tokens) for place, each in halves.items()}
    steps = len(step_frames)
    arrays = {"cross_attention": attention[..., :steps]}
    if attention.shape[-1] > steps:
        arrays["padding_attention"] = attention[..., steps:].sum(axis=-1)
    arrays |= {
        "encoder_saliency": units["encoder"].cells(masks["encoder"].partition.labels),
        "features": features.cpu().numpy(),
        "input_scores": scores["input"],
        "encoder_scores": scores["encoder"],
        **units["input"].compact(),
        "segmentation": masks["input"].partition.labels,
        **{f"{place}_halves": each.astype(np.float32) for place, each in halves.items() if each is not None},
    }
    return build(
        arrays,
        tokens=tokens,
        times=frame_times(len(features), model.first_frame, model.frame_seconds),
        step_frames=step_frames,
        bands=model.band_centres,
        attributes=attributes,
    )
