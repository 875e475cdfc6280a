"""Continue training `base` with a loss on its cross-attention: `python -m recipes.regularise`.

Explanations read the cross-attention averaged over heads and layers. Here, the average over the heads of the upper half
of the layers is drawn towards one of four things, for the spoken tokens of some training utterances:
    input_saliency     SM^X of the starting model, from windows of time
    encoder_saliency   SM^H of the starting model
    word_times         the time in which the token's word was spoken
    entropy            nothing in particular; its entropy is lowered
    control            nothing; the same batches without such a loss
Lower layers are left alone, because they often attend to the previous token, and `xattn.word_times` skips them too.

A run is a variant with a weight, such as `word_times-low`. "high" makes the gradient of the loss on attention as large
as that of the training objective at the start, "low" a fifth of it. All runs start from the same weights, and runs with
the same seed see the same batches. Run the command again to resume. It writes to data/train/regularised
    targets/<utterance>.npz, targets.csv   what attention is drawn towards, and the reliability of the maps
    gradients/<variant>.json               norms of both gradients at the start
    <variant>-<weight>-<seed>              the models
It needs `make data`.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

import xattn
from recipes.make_corpus import SEED, record
from recipes.train import (
    RECIPES,
    Recipe,
    TrainingData,
    export,
    load_dev,
    losses,
    optimise,
    spec_augment,
    validate,
)
from xattn.analysis.localisation import token_times
from xattn.data.utterance import Utterance, Word
from xattn.files import hash_file, hash_value, replacing, write_whole
from xattn.maps import drop_special_tokens, on_steps
from xattn.models import S2TModel
from xattn.models.conformer import ConformerModel, subsampled

LANGUAGE = "en"
TARGETS = ("input_saliency", "encoder_saliency", "word_times")
RATIOS = {"low": 0.2, "high": 1.0}  # of the two gradients' norms at the start
CONTROL = "control-none"
RUNS = (CONTROL, *(f"{variant}-{weight}" for variant in (*TARGETS, "entropy") for weight in RATIOS))
SEEDS = (0, 1, 2)
EXPLAINED = 600  # training utterances whose attention is regularised
# Half the frames of a batch are from explained utterances. The rate is a tenth of the highest in the training of base.
START = replace(
    RECIPES["base"], schedule=((0, 0.0), (50, 2e-4), (400, 0.0)), batch_frames=RECIPES["base"].batch_frames // 2
)
OCCLUSION = xattn.Occlusion(input_masks=150, encoder_masks=300, precision="float32", reliability=1.0)
CALIBRATION = 8  # steps over which norms of gradients are averaged
VERSION = 1  # of the targets: raise it with any change that moves them


@dataclass(frozen=True)
class Batches:
    """What every run trains on.

    everything: all training utterances; explained: those with targets.
    targets: by id, the targets of an utterance by name, float32 (spoken token, step).
    """

    everything: TrainingData
    explained: TrainingData
    targets: dict[str, dict[str, np.ndarray]]


def distributions(rows: np.ndarray) -> np.ndarray:
    """Scale the positive values of each row (..., step) to a sum of 1; a row without any becomes 0."""
    rows = np.maximum(rows, 0)
    totals = rows.sum(axis=-1, keepdims=True)
    return np.divide(rows, totals, out=np.zeros_like(rows), where=totals > 0)


def shares_of_words(steps: xr.DataArray, words: Sequence[Word], language: str) -> np.ndarray:
    """The share of each step in the time of the word that a token transcribes: (token, step).

    Rows sum to 1; those of tokens without a word are 0. steps: an array with the coordinates token and step.
    """
    start, end = token_times(steps, words, language).T[..., None]
    first, last = np.maximum(steps.step_start.values, start), np.minimum(steps.step_end.values, end)
    return distributions(np.nan_to_num(last - first))


def resynthesise(row) -> Utterance:
    """Synthesise a training utterance again, as its features have no audio and no word times.

    row: of data/train/<language>.csv. SystemExit: the samples differ from those that the features were made from.
    """
    recording = record(LANGUAGE, "train", SEED, int(row.id.rpartition("-")[2]) - 1)
    if recording.row["sha256"] != row.sha256:
        raise SystemExit(f"{row.id} sounds different now than in the training features: run `make data` again.")
    return Utterance(
        id=row.id,
        audio_path=None,
        language=LANGUAGE,
        duration=recording.row["duration"],
        transcript=row.transcript,
        words=tuple(Word(each.text, each.start, each.end) for each in recording.words),
        samples=(recording.pcm / 2**15).astype(np.float32),
    )


def targets_of(model: S2TModel, utterance: Utterance, occlusion: xattn.Occlusion) -> dict[str, np.ndarray]:
    """Return TARGETS, (spoken token, step) each, and the reliability of both maps.

    The model is forced to write the transcript, as in training.
    """
    maps = xattn.explain(model, utterance, text=utterance.transcript, occlusion=occlusion, progress=False)
    saliency = {name: drop_special_tokens(on_steps(maps[name], maps)) for name in TARGETS[:2]}
    found = {name: distributions(each.values) for name, each in saliency.items()}
    found["word_times"] = shares_of_words(saliency["encoder_saliency"], utterance.words, utterance.language)
    return {name: each.astype(np.float32) for name, each in found.items()} | {
        f"{place}_reliability": np.float32(maps.attrs[f"{place}_reliability"]) for place in ("input", "encoder")
    }


def make_targets(
    model: S2TModel,
    table: pd.DataFrame,
    folder: Path,
    occlusion: xattn.Occlusion = OCCLUSION,
    utterance_of: Callable[..., Utterance] = resynthesise,
) -> dict[str, dict[str, np.ndarray]]:
    """Make the targets of each row of the training table, or read them from folder/targets: by id.

    Also writes folder/targets.csv with the reliability of the maps. SystemExit: see `resynthesise`.
    """
    found, reliability = {}, []
    for number, row in enumerate(table.itertuples(), start=1):
        path = folder / "targets" / f"{row.id}.npz"
        key = hash_value([VERSION, model.weights_hash, row.sha256, row.transcript, asdict(occlusion)], 16)
        stored = dict(np.load(path)) if path.is_file() else {"key": ""}
        if stored["key"] != key:
            stored = {"key": np.array(key)} | targets_of(model, utterance_of(row), occlusion)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **stored)
        if number % 50 == 0 or number == len(table):
            print(f"targets: {number} of {len(table)}", flush=True)
        found[row.id] = {name: stored[name] for name in TARGETS}
        reliability.append((row.id, *(float(stored[f"{place}_reliability"]) for place in ("input", "encoder"))))
    columns = ["id", "input_reliability", "encoder_reliability"]
    write_whole(folder / "targets.csv", pd.DataFrame(reliability, columns=columns).to_csv(index=False).encode())
    return found


def upper_average(attentions: Sequence[Tensor]) -> Tensor:
    """Average cross-attention (B, H, I, S) of each layer over the heads of the upper half of the layers: (B, I, S)."""
    return torch.stack([*attentions[len(attentions) // 2 :]]).float().mean(dim=(0, 2))


def attention_loss(variant: str, attention: Tensor, targets: Tensor) -> Tensor:
    """The loss on attention in nats, averaged over the tokens that have a target.

    It is the entropy of the attention for "entropy", and KL(target || attention) otherwise.

    attention, targets: (B, I, S); rows of targets sum to 1, or to 0 for a token without one.
    """
    log = attention.clamp(min=torch.finfo(attention.dtype).tiny).log()
    if variant == "entropy":
        values = -(attention * log).sum(dim=-1)
    else:
        values = (torch.special.xlogy(targets, targets) - targets * log).sum(dim=-1)
    return values[targets.sum(dim=-1) > 0].mean()


def on_upper_half(variant: str, targets: Tensor) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Return `attention_loss` as a function of the cross-attention of each layer, (B, H, I, S)."""
    return lambda attentions: attention_loss(variant, upper_average(attentions), targets)


def padded_targets(targets: Sequence[np.ndarray], tokens: int, steps: int, first: int) -> Tensor:
    """Stack targets (spoken token, step) to (B, tokens, steps), cut to the steps and scaled to rows that sum to 1.

    first: the decoder position that predicts the first token.
    """
    stacked = np.zeros((len(targets), tokens, steps), dtype=np.float32)
    for row, each in zip(stacked, targets, strict=True):
        row[first : first + len(each)] = distributions(each[:, :steps])
    return torch.from_numpy(stacked)


def step_losses(model: ConformerModel, recipe: Recipe, batches: Batches, variant: str, step: int) -> dict[str, Tensor]:
    """Compute the training objective of a step, averaged over a batch of any utterances and one of explained ones.

    SpecAugment hides parts of the input. The targets remain those of the whole recording.

    Returns the parts of `recipes.train.losses`; "attention" is the loss on attention, unless the variant is "control".
    """
    generator = np.random.default_rng((recipe.seed, step, 1))
    found = []
    for training in (batches.everything, batches.explained):
        features, table = training.batch(training.rows(step, recipe.seed))
        features = [spec_augment(item, generator).to(model.device) for item in features]
        texts = [torch.tensor(ids, device=model.device) for ids in model.tokenizer.encode(list(table.transcript))]
        prompt, on_attention = model.prompt(LANGUAGE), None
        if training is batches.explained and variant != "control":
            name = variant if variant in TARGETS else "word_times"  # which only says what tokens are words
            rows = [batches.targets[id][name] for id in table.id]
            size = len(prompt) + max(map(len, texts)), subsampled(len(features[0]))
            targets = padded_targets(rows, *size, first=len(prompt) - 1).to(model.device)
            on_attention = on_upper_half(variant, targets)
        found.append(losses(model.network, recipe, features, texts, texts, [prompt] * len(texts), on_attention))
    both = {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}
    return both | {name: found[1][name] for name in found[1].keys() - both.keys()}


def load_start(data: Path, device: str) -> ConformerModel:
    """Load `base` so that it can be trained, with eager attention, as other kinds return no weights."""
    model = ConformerModel.from_folder(data / "models" / "base", device)
    model.network.requires_grad_(True).set_attn_implementation("eager")
    return model


def gradient_norms(model: ConformerModel, recipe: Recipe, batches: Batches, variant: str) -> dict[str, float]:
    """Norms of the gradients of the objective ("loss") and of the loss on attention, averaged over some steps."""
    model.network.train()
    parameters, norms = [*model.network.parameters()], {"loss": [], "attention": []}
    for step in range(CALIBRATION):
        torch.manual_seed(step)
        parts = step_losses(model, recipe, batches, variant, step)
        for name, values in norms.items():
            gradients = torch.autograd.grad(parts[name], parameters, retain_graph=True, allow_unused=True)
            values.append(torch.stack([each.norm() for each in gradients if each is not None]).norm().item())
    return {name: float(np.mean(values)) for name, values in norms.items()}


def stored_norms(data: Path, device: str, recipe: Recipe, batches: Batches, variant: str, origin: str) -> dict:
    """`gradient_norms` of the starting model, stored so that a resumed run has the same weight. origin: see `run`."""
    path = data / "train" / "regularised" / "gradients" / f"{variant}.json"
    key = hash_value([origin, variant, asdict(recipe)])
    if path.is_file() and (stored := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return stored["norms"]
    norms = gradient_norms(load_start(data, device), recipe, batches, variant)
    write_whole(path, json.dumps({"key": key, "norms": norms}).encode())
    return norms


def run(name: str, seed: int, start: Recipe, batches: Batches, data: Path, device: str, origin: str) -> None:
    """Continue the training of `base` with one of RUNS and a seed; resume from a checkpoint if there is one.

    origin: a hash of the starting weights, the training data and the targets.
    """
    variant, _, weight = name.partition("-")
    factor = 0.0
    if name != CONTROL:
        norms = stored_norms(data, device, start, batches, variant, origin)
        factor = RATIOS[weight] * norms["loss"] / norms["attention"]
    recipe = replace(start, name=f"{name}-{seed}", seed=seed, validate_every=start.steps)
    model = load_start(data, device)
    work = data / "train" / "checkpoints" / "regularised" / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    (work / "spm.model").write_bytes((data / "models" / "base" / "spm.model").read_bytes())
    dev = load_dev(model, data, [LANGUAGE])

    def objective(step: int) -> dict[str, Tensor]:
        parts = step_losses(model, recipe, batches, variant, step)
        return parts | {"loss": parts["loss"] + factor * parts["attention"]} if "attention" in parts else parts

    fingerprint = hash_value([origin, asdict(recipe), factor])
    optimise(model, recipe, work, fingerprint, objective, lambda step: validate(model, *dev, translate=False))
    export(model, recipe, work, data / "train" / "regularised" / recipe.name)


def regularise(
    names: Sequence[str],
    seeds: Sequence[int],
    data: Path,
    device: str = "cpu",
    explained: int = EXPLAINED,
    start: Recipe = START,
    **options,
) -> None:
    """Make the targets and train the runs with each seed, the first seed of all runs first.

    Args:
        names: of RUNS.
        explained: number of training utterances whose attention is regularised.
        options: of `make_targets`.

    Raises:
        SystemExit: see `recipes.train.TrainingData` and `resynthesise`.
    """
    everything = TrainingData(data / "train", (LANGUAGE,), start.batch_frames)
    table = everything.table.sort_values("id")[:explained]
    model = load_start(data, device)
    targets = make_targets(model, table, data / "train" / "regularised", **options)
    batches = Batches(everything, TrainingData(data / "train", (LANGUAGE,), start.batch_frames, targets), targets)
    files = [data / "train" / f"{LANGUAGE}.csv", data / "train" / "regularised" / "targets.csv"]
    origin = hash_value([model.weights_hash, *map(hash_file, files)])
    for seed in seeds:
        for name in names:
            run(name, seed, start, batches, data, device, origin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=RUNS, help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of features and models; default: data")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the number of cores")
    arguments = parser.parse_args()
    unknown = set(arguments.runs) - set(RUNS)
    if unknown:
        parser.error(f"there is no run {', '.join(sorted(unknown))}: choose among {', '.join(RUNS)}")
    torch.set_num_threads(arguments.threads)
    regularise(arguments.runs, arguments.seeds, arguments.data, arguments.device)


if __name__ == "__main__":
    main()
