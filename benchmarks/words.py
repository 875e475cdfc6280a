"""Compare word times from attention with hand-made ones: `python -m benchmarks.words MODEL SPEECH`.

MODEL is a Whisper checkpoint, such as a faster-whisper folder, and SPEECH a folder of TIMIT. Times of faster-whisper
need its package (`pip install faster-whisper`) and a faster-whisper folder; otherwise their row is missing.
"""

import argparse
import importlib
import platform
from collections.abc import Callable, Iterable
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.ndimage import median_filter
from scipy.stats import spearmanr
from tabulate import tabulate
from transformers import WhisperForConditionalGeneration, pipeline
from transformers.models.whisper.generation_whisper import _dynamic_time_warping
from transformers.utils import logging

import xattn
from xattn.analysis.intervals import jackknife_interval
from xattn.analysis.localisation import KINDS, token_kinds, token_times
from xattn.analysis.normalisation import standardise_over_tokens
from xattn.attribution.attention import cross_attention
from xattn.audio import SAMPLE_RATE
from xattn.data.utterance import Utterance
from xattn.maps import build, frame_times, word_numbers
from xattn.models import S2TModel
from xattn.words import align, word_times

WITHIN = (20, 50, 100, 200)  # ms
FILTER = 7  # steps, the width of Whisper's median filter


@torch.inference_mode()
def attention_maps(model: S2TModel, utterance: Utterance, text: str | None = None) -> xr.Dataset:
    """Return maps with the attention of a forced text, or of the model's own hypothesis, and without saliency."""
    features = model.features(utterance.audio())
    prompt = model.prompt(utterance.language)
    ids = model.generate(features[None], utterance.language)[0] if text is None else model.token_ids(text)
    inputs, step_frames = torch.cat([prompt, ids])[:-1], model.step_frames(len(features))
    attention = cross_attention(model, model.encode(features[None]), inputs)[:, :, len(prompt) - 1 :]
    return build(
        {"cross_attention": attention[..., : len(step_frames)], "features": features.cpu().numpy()},
        tokens=model.tokens(ids),
        times=frame_times(len(features), model.first_frame, model.frame_seconds),
        step_frames=step_frames,
        attributes={"utterance": utterance.id},
    )


def bare_times(maps: xr.Dataset, heads: Iterable[np.ndarray], warp: Callable) -> pd.DataFrame:
    """Return word times from the edges of each token's steps.

    Heads (token, step) are standardised over tokens, filtered and averaged, as in Whisper.

    warp: a function from scores (token, step) to the first and last step of each token.
    """
    scores = np.mean([median_filter(standardise_over_tokens(head), (1, FILTER)) for head in heads], axis=0)
    first, last = warp(scores)
    tokens = maps.token.values.tolist()
    numbers, spoken = word_numbers(tokens), np.isin(token_kinds(tokens), KINDS[:2])
    rows = []
    for number in np.unique(numbers[spoken]):
        members = np.flatnonzero((numbers == number) & spoken)
        start, end = maps.step_start.values[first[members[0]]], maps.step_end.values[last[members[-1]]]
        rows.append((str(maps.word.values[members[0]]), max(start, 0.0), end))
    return pd.DataFrame(rows, columns=["word", "start", "end"])


def runs(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last step of each token if each step has a single token."""
    owner, tokens = align(scores), np.arange(len(scores))
    return np.searchsorted(owner, tokens), np.searchsorted(owner, tokens, side="right") - 1


def whisper_warp(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last step of each token in the warping of Whisper, in which tokens can share steps."""
    owner, steps = _dynamic_time_warping(-scores)
    bounds = [steps[owner == token][[0, -1]] for token in range(len(scores))]
    return tuple(np.array(bounds).T)


def faster_whisper(source: Path) -> Callable[[Utterance], pd.DataFrame]:
    """Return the word times of faster-whisper for an utterance, with its defaults. ImportError: it is missing."""
    model = importlib.import_module("faster_whisper").WhisperModel(str(source), "cpu", compute_type="float32")

    def times(utterance: Utterance) -> pd.DataFrame:
        segments, _ = model.transcribe(utterance.audio(), language=utterance.language, word_timestamps=True)
        rows = [(word.word, word.start, word.end) for segment in segments for word in segment.words]
        return pd.DataFrame(rows, columns=["word", "start", "end"])

    return times


def transformers_times(model: S2TModel) -> Callable[[Utterance], pd.DataFrame]:
    """Return the word times of transformers' pipeline for an utterance, with the same weights and its defaults."""
    network = WhisperForConditionalGeneration(deepcopy(model.config)).eval()
    network.load_state_dict(model.network.state_dict())
    settings = deepcopy(model.network.generation_config)
    last = model.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    settings.suppress_tokens = [token for token in settings.suppress_tokens if token <= last]  # time stamps are allowed
    settings.no_timestamps_token_id, settings.is_multilingual = last, model.multilingual
    network.generation_config = settings
    recogniser = pipeline(
        "automatic-speech-recognition", network, tokenizer=model.tokenizer, feature_extractor=model.extractor
    )

    def times(utterance: Utterance) -> pd.DataFrame:
        audio = {"raw": utterance.audio().copy(), "sampling_rate": SAMPLE_RATE}
        chunks = recogniser(audio, return_timestamps="word")["chunks"]
        return pd.DataFrame([(each["text"], *each["timestamp"]) for each in chunks], columns=["word", "start", "end"])

    return times


def errors(words: pd.DataFrame, utterance: Utterance) -> np.ndarray:
    """Return the errors of starts and ends in seconds, NaN for words that do not match the reference: (n, 2)."""
    names = [f"▁{word.strip()}" for word in words.word]
    tokens = xr.DataArray(np.zeros(len(names)), dims="token", coords={"token": np.array(names, dtype=str)})
    return words[["start", "end"]].to_numpy(float) - token_times(tokens, utterance.words, utterance.language)


def row(name: str, text: str, found: list[np.ndarray]) -> dict:
    """Return a row of the table from the errors of each utterance's matched words, (n, 2)."""
    absolute = [1000 * np.abs(each[~np.isnan(each[:, 0])]) for each in found]
    starts, ends = np.concatenate(absolute).T

    def share(rows: np.ndarray) -> float:
        return 100 * np.mean(np.concatenate([absolute[row][:, 0] for row in rows]) <= 100)

    _, low, high = jackknife_interval(share, len(found))
    return {
        "method": name,
        "text": text,
        "words": len(starts),
        "starts: median": f"{np.median(starts):.0f} ms",
        **{f"within {limit} ms": f"{100 * np.mean(starts <= limit):.0f} %" for limit in WITHIN},
        "95 % interval of within 100 ms": f"{low:.0f} to {high:.0f} %",
        "ends: median": f"{np.median(ends):.0f} ms",
        "ends: within 100 ms": f"{100 * np.mean(ends <= 100):.0f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Whisper checkpoint")
    parser.add_argument("speech", type=Path, help="a folder of TIMIT")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # small passes gain nothing from more
    model = xattn.load_model(arguments.model)
    utterances = xattn.utterances_from_timit(arguments.speech)
    forced = [attention_maps(model, each, each.transcript) for each in utterances]
    heads = model.network.generation_config.alignment_heads

    def alignment_heads(maps: xr.Dataset) -> pd.DataFrame:
        return bare_times(maps, [maps.cross_attention.values[layer, head] for layer, head in heads], whisper_warp)

    def mean_head(maps: xr.Dataset) -> pd.DataFrame:
        return bare_times(maps, [maps.cross_attention.mean(["layer", "head"]).values], runs)

    times = {("xattn.word_times", "given"): [word_times(maps) for maps in forced]}
    times["mean of all heads, edges of steps", "given"] = [mean_head(maps) for maps in forced]
    if heads:
        times["the checkpoint's alignment heads", "given"] = [alignment_heads(maps) for maps in forced]
    times["xattn.word_times", "own"] = [word_times(attention_maps(model, each)) for each in utterances]
    if heads:
        times["transformers", "own"] = [*map(transformers_times(model), utterances)]
    try:
        times["faster-whisper", "own"] = [*map(faster_whisper(arguments.model), utterances)]
    except (ImportError, RuntimeError) as error:
        print(f"The row of faster-whisper is missing: {error}")
    found = {key: [*map(errors, tables, utterances)] for key, tables in times.items()}
    rows = [row(*key, each) for key, each in found.items()]
    print(tabulate(rows, headers="keys", tablefmt="github"))
    ours = times["xattn.word_times", "given"]
    confidence = np.concatenate([table.confidence for table in ours])
    starts = np.abs(np.concatenate(found["xattn.word_times", "given"])[:, 0])
    known = ~np.isnan(starts)
    rho = spearmanr(confidence[known], starts[known]).statistic
    print(f"Spearman's correlation of confidence with the error of starts: {rho:.2f}")
    for name, some in {"below 0.5": confidence < 0.5, "1": confidence == 1}.items():
        error = 1000 * np.median(starts[known & some])
        print(f"confidence {name}: {np.sum(known & some)} words, median error of starts {error:.0f} ms")
    names = ("torch", "transformers", "faster-whisper", "ctranslate2")
    print(f"{len(utterances)} utterances; Python {platform.python_version()}, {', '.join(map(installed, names))}")


def installed(package: str) -> str:
    """Return a package with its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    main()
