"""Train the miniature models: `python -m recipes.train base`.

The objective is label-smoothed cross-entropy plus CTC, with SpecAugment. The features come from `make data`, or from
`recipes.features` for other corpora. Training is seeded and writes a checkpoint once a minute; run the command again to
resume. The finished model is written to data/models/<name>: configuration, float16 weights, SentencePiece model and
training log.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional

from xattn.analysis.quality import bleu, transcribe, wer
from xattn.audio import cmvn
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance
from xattn.files import hash_file, hash_value, replacing
from xattn.models.conformer import (
    ConformerConfig,
    ConformerForConditionalGeneration,
    ConformerModel,
    subsampled,
)

BOS, PAD, EOS = 0, 1, 2  # <s> is also the CTC blank, because the decoder never emits it
CHECKPOINT = "last.pt"
CHECKPOINT_SECONDS = 60.0
OTHER = {"en": "it", "it": "en"}  # the language that each is translated into
LENGTH_STEP = 8  # frames by which lengths are rounded down; utterances end with at least 10 frames of silence


@dataclass(frozen=True)
class Recipe:
    """Size, data and training schedule of a model.

    schedule: points (step, learning rate), interpolated linearly; training ends at the last step.
    translation_from: the first step at which each target is, with probability 0.5, the translation; None for never.
    encoder_from: the recipe whose trained encoder initialises this one's, see `initialise_encoder`.
    batch_frames: the most frames in a batch.
    max_target_positions: the longest output in tokens, prompt included.
    intermediate_ctc, final_ctc: weights of the two CTC losses.
    validate_every: steps between two validations on dev.
    """

    name: str
    languages: tuple[str, ...]
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    schedule: tuple[tuple[int, float], ...]
    translation_from: int | None = None
    encoder_from: str | None = None
    d_model: int = 128
    heads: int = 4
    batch_frames: int = 12_000
    dropout: float = 0.0  # SpecAugment and noise regularise enough, and dropout takes a quarter of a step's time
    label_smoothing: float = 0.1
    max_target_positions: int = 128
    intermediate_ctc: float = 0.25
    final_ctc: float = 0.5
    validate_every: int = 1000
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.schedule[-1][0]


BOTH = ("en", "it")
# The schedule of the shipped weights. It was extended twice during training, because the first plans were too short;
# each time the learning rate was raised again. A third extension (up to 1e-3, 1,600 steps) was dropped, because it
# changed the English WER from 16.6 to 13.2 on dev, but from 16.0 to 16.7 on test.
SMALL = (
    *((0, 0.0), (500, 2e-3), (6307, 2.13e-4), (6500, 1.1e-3), (7000, 1e-3)),
    *((14_000, 0.0), (14_100, 5e-4), (16_000, 0.0)),
)
# To save time, large's encoder starts from small's; its decoder, whose attention is studied, is trained from scratch.
LARGE = ((0, 0.0), (200, 1.2e-3), (4000, 0.0))
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("base", ("en",), 4, 6, 1000, ((0, 0.0), (500, 2e-3), (6000, 0.0))),
        Recipe("small", BOTH, 4, 6, 1500, SMALL, translation_from=2500, d_model=144),
        Recipe("large", BOTH, 10, 12, 1500, LARGE, translation_from=800, encoder_from="small", d_model=144),
        # The size of the paper's base model (paper, section 4). It has 116 M parameters instead of 125 M, because input
        # and output embeddings are shared. It needs a GPU and features of a large corpus. It was never run; schedule
        # and regularisation are our choice.
        Recipe(
            "paper/base",
            ("en",),
            12,
            6,
            8000,
            ((0, 0.0), (25_000, 2e-3), (200_000, 0.0)),
            d_model=512,
            heads=8,
            batch_frames=40_000,
            dropout=0.1,
            max_target_positions=512,  # segments of parliamentary speeches are long
        ),
    )
}
SHIPPED = ("base", "small", "large")


class TrainingData:
    """Log-Mel features and texts of the training utterances, in batches of equal length.

    folder: holds <language>.npy and <language>.csv, see `recipes.features`; batch_frames: the most frames in a batch.
    ids: of the utterances to use; by default all.
    """

    def __init__(self, folder: Path, languages: tuple[str, ...], batch_frames: int, ids: Collection[str] | None = None):
        tables = []
        self.features = {}
        for language in languages:
            table, features = folder / f"{language}.csv", folder / f"{language}.npy"
            if not (table.is_file() and features.is_file()):
                raise SystemExit(
                    f"There are no training features for {language!r} in {folder}: run `make data` first, or "
                    f"`python -m recipes.features CORPUS {language}` for your own corpus."
                )
            tables.append(pd.read_csv(table, keep_default_na=False).assign(language=language))
            self.features[language] = np.load(features, mmap_mode="r")
        self.table = pd.concat(tables, ignore_index=True)
        # All utterances of a batch have the same length, so nothing is padded and few tensor shapes occur. The frames
        # that rounding cuts off belong to the silence at the end.
        self.table["frames"] = self.table.frames // LENGTH_STEP * LENGTH_STEP
        self.table = self.table[(self.table.frames > 0) & (True if ids is None else self.table.id.isin(ids))]
        self.batches = []
        for frames, group in self.table.groupby("frames"):
            rows = np.random.default_rng(0).permutation(group.index.to_numpy())
            parts = -(-len(rows) * frames // batch_frames)
            self.batches.extend(np.array_split(rows, parts))

    def rows(self, step: int, seed: int) -> np.ndarray:
        """Return the one of `batches` that a step trains on; every epoch has its own order."""
        epoch, place = divmod(step, len(self.batches))
        return self.batches[np.random.default_rng((seed, epoch)).permutation(len(self.batches))[place]]

    def batch(self, rows: np.ndarray) -> tuple[list[Tensor], pd.DataFrame]:
        """Return the normalised features (T, F) of each utterance and the rows of the table.

        rows: one of `batches`.
        """
        table = self.table.loc[rows]
        features = [
            torch.from_numpy(
                cmvn(np.array(self.features[row.language][row.start_frame : row.start_frame + row.frames]))
            )
            for row in table.itertuples()
        ]
        return features, table


def spec_augment(features: Tensor, generator: np.random.Generator) -> Tensor:
    """Return features (T, F) with two bands of up to 20 mels and two stretches of up to 25 frames set to 0.

    0 is the mean of normalised features (SpecAugment, Park et al. 2019, arXiv 1904.08779).
    """
    features = features.clone()
    frames, mels = features.shape
    for axis, limit, size in ((1, 20, mels), (1, 20, mels), (0, 25, frames), (0, 25, frames)):
        width = int(generator.integers(0, limit + 1))
        start = int(generator.integers(0, max(1, size - width)))
        features.narrow(axis, start, min(width, size - start)).zero_()
    return features


def pad(sequences: list[Tensor], value: float) -> tuple[Tensor, Tensor]:
    """Stack sequences (length, ...): return (B, longest, ...), padded with `value`, and the lengths (B,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value), lengths


def ctc_loss(logits: Tensor, frames: Tensor, targets: list[Tensor]) -> Tensor:
    """CTC loss per target token, averaged over utterances.

    logits: (B, S, V); frames: (B,), the input lengths; targets: token ids of each utterance.
    """
    labels, lengths = pad(targets, PAD)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(log_probs, labels, subsampled(frames), lengths, blank=BOS, zero_infinity=True)


def losses(
    network,
    recipe: Recipe,
    features,
    transcripts,
    targets,
    prompts,
    attention_loss: Callable[[tuple[Tensor, ...]], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the training objective (paper, section 4): the weighted sum "loss", and its three parts.

    The parts are label-smoothed cross-entropy on the target, CTC on the transcript after an intermediate encoder layer,
    and CTC on the target after the last one.

    Args:
        features: (T, F) of each utterance.
        transcripts, targets: token ids of each utterance, without </s>.
        prompts: the decoder's first tokens of each utterance.
        attention_loss: a function of the cross-attention of each layer, (B, H, I, S). Its value is returned as
            "attention" and is not part of "loss". The network needs eager attention.
    """
    inputs, frames = pad(features, 0.0)
    attention_mask = (torch.arange(inputs.shape[1], device=inputs.device) < frames[:, None]).long()
    end = torch.tensor([EOS], device=inputs.device)
    labels, _ = pad([torch.cat([target, end]) for target in targets], -100)
    decoder_inputs, _ = pad([torch.cat([prompt, t]) for prompt, t in zip(prompts, targets, strict=True)], PAD)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        encoded = network.encoder(inputs, attention_mask)
        output = network(
            attention_mask=attention_mask,
            encoder_outputs=encoded,
            decoder_input_ids=decoder_inputs,
            use_cache=False,
            output_attentions=attention_loss is not None,
        )
        intermediate, final = network.ctc_logits(encoded.hidden_states)
    cross_entropy = functional.cross_entropy(
        output.logits.float().flatten(0, 1), labels.flatten(), label_smoothing=recipe.label_smoothing
    )
    first, second = ctc_loss(intermediate, frames, transcripts), ctc_loss(final, frames, targets)
    total = cross_entropy + recipe.intermediate_ctc * first + recipe.final_ctc * second
    parts = {"loss": total, "cross_entropy": cross_entropy, "intermediate_ctc": first, "final_ctc": second}
    return parts if attention_loss is None else parts | {"attention": attention_loss(output.cross_attentions)}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Interpolate the recipe's schedule at a step."""
    return float(np.interp(step, *zip(*recipe.schedule, strict=True)))


def train_tokenizer(recipe: Recipe, table: pd.DataFrame, path: Path) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece unigram model on all target texts, with a tag for each language, unless `path` holds one.

    table: the training utterances, with the columns transcript and translation.
    """
    if not path.is_file():
        texts = list(table.transcript) + (list(table.translation) if recipe.translation_from is not None else [])
        vocabulary = io.BytesIO()  # if SentencePiece wrote the file, the model would contain its path
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=vocabulary,
            vocab_size=recipe.vocabulary,
            model_type="unigram",
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=3,
            control_symbols=[f"<lang:{language}>" for language in recipe.languages],
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
        path.write_bytes(vocabulary.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def configuration(recipe: Recipe, tokenizer) -> ConformerConfig:
    """Return the configuration of a recipe's network with the vocabulary of a SentencePiece processor."""
    return ConformerConfig(
        vocab_size=len(tokenizer),
        d_model=recipe.d_model,
        encoder_layers=recipe.encoder_layers,
        decoder_layers=recipe.decoder_layers,
        encoder_attention_heads=recipe.heads,
        decoder_attention_heads=recipe.heads,
        encoder_ffn_dim=4 * recipe.d_model,
        decoder_ffn_dim=4 * recipe.d_model,
        conv_channels=2 * recipe.d_model,
        ctc_encoder_layer=max(1, 2 * recipe.encoder_layers // 3),
        final_ctc=True,
        dropout=recipe.dropout,
        attention_dropout=recipe.dropout,
        max_target_positions=recipe.max_target_positions,
        tie_word_embeddings=True,
        language_ids={language: tokenizer.piece_to_id(f"<lang:{language}>") for language in recipe.languages},
    )


# Parameters that project what a Conformer layer's modules add to their input.
RESIDUALS = (
    "first_feed_forward.second_linear",
    "attention.attention.out_proj",
    "conv_module.second_pointwise_conv1d",
    "second_feed_forward.second_linear",
)


def initialise_encoder(network: ConformerForConditionalGeneration, folder: Path) -> None:
    """Copy the encoder of a trained model of the same width into a deeper network, repeating its layers.

    Both encoders then give the same output, because a repeated layer starts as the identity: the projections of its
    residual branches are zero (block expansion, LLaMA Pro, Wu et al. 2024, arXiv 2401.02415). The final norm of a layer
    moves to the layer's last repetition.

    Args:
        network: changed in place.
        folder: of the trained model.

    Raises:
        SystemExit: there is no such folder.
    """
    if not folder.is_dir():
        raise SystemExit(f"There is no trained model {folder} to copy the encoder from: train {folder.name} first.")
    trained = ConformerModel.from_folder(folder).network.encoder
    before, depth = len(trained.conformer_layers), len(network.encoder.conformer_layers)
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("conformer_layers.")}
    sources = [layer * before // depth for layer in range(depth)]
    for layer, source in enumerate(sources):
        copied = trained.conformer_layers[source].state_dict()
        if source in sources[layer + 1 :]:
            copied |= {
                "layernorm.weight": torch.ones_like(copied["layernorm.weight"]),
                "layernorm.bias": torch.zeros_like(copied["layernorm.bias"]),
            }
        if source in sources[:layer]:
            zeroed = [f"{name}.{part}" for name in RESIDUALS for part in ("weight", "bias")]
            copied |= {name: torch.zeros_like(copied[name]) for name in zeroed}
        state |= {f"conformer_layers.{layer}.{name}": value for name, value in copied.items()}
    network.encoder.load_state_dict(state)


def validate(
    model: ConformerModel, dev: dict[str, list[Utterance]], features: dict[str, list[Tensor]], translate: bool
) -> dict[str, float]:
    """Return the WER on dev for each language and, with `translate`, the BLEU of its translation.

    dev, features: utterances and their features (T, F) by language.
    """
    scores = {}
    for language, utterances in dev.items():
        output = transcribe(model, features[language], language)
        scores[f"dev_wer_{language}"] = round(wer([u.transcript for u in utterances], output, language), 2)
        if translate:
            output = transcribe(model, features[language], OTHER[language])
            scores[f"dev_bleu_{language}-{OTHER[language]}"] = round(
                bleu([u.translation for u in utterances], output), 2
            )
    return scores


def train(recipe: Recipe, data: Path, device: str = "cpu", dev_corpus: Path | None = None) -> None:
    """Train a model on data/train and write it to data/models/<name>; resume from a checkpoint if there is one.

    Args:
        dev_corpus: the corpus folder whose dev part is used for validation; `data` by default.

    Raises:
        SystemExit: there are no training features, or the checkpoint belongs to another recipe or other training data.
    """
    work = data / "train" / "checkpoints" / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    training = TrainingData(data / "train", recipe.languages, recipe.batch_frames)
    tokenizer = train_tokenizer(recipe, training.table, work / "spm.model")
    torch.manual_seed(recipe.seed)
    network = ConformerForConditionalGeneration(configuration(recipe, tokenizer)).to(device)
    model = ConformerModel(network, tokenizer, recipe.name, weights_hash="in training")
    # The schedule may be extended when training is resumed; the rest of the recipe and the data must stay the same.
    fixed = asdict(replace(recipe, schedule=(), validate_every=0))
    fingerprint = hash_value([fixed, *(hash_file(data / "train" / f"{language}.csv") for language in recipe.languages)])
    if recipe.encoder_from is not None and not (work / CHECKPOINT).is_file():
        initialise_encoder(network, data / "models" / recipe.encoder_from)
    dev = load_dev(model, dev_corpus or data, recipe.languages)

    def translating(step: int) -> bool:
        return recipe.translation_from is not None and step >= recipe.translation_from

    def objective(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((recipe.seed, step, 1))
        features, table = training.batch(training.rows(step, recipe.seed))
        features = [spec_augment(item, generator).to(device) for item in features]
        translated = np.zeros(len(table), dtype=bool)
        if translating(step):
            translated = generator.random(len(table)) < 0.5
        transcripts, translations = (
            [torch.tensor(ids, device=device) for ids in tokenizer.encode(list(texts))]
            for texts in (table.transcript, table.translation)
        )
        targets = [b if t else a for a, b, t in zip(transcripts, translations, translated, strict=True)]
        written = [OTHER[own] if t else own for own, t in zip(table.language, translated, strict=True)]
        return losses(network, recipe, features, transcripts, targets, [model.prompt(w) for w in written])

    optimise(
        model, recipe, work, fingerprint, objective, lambda step: validate(model, *dev, translate=translating(step - 1))
    )
    export(model, recipe, work, data / "models" / recipe.name)


def load_dev(model: ConformerModel, folder: Path, languages: Collection[str]) -> tuple[dict, dict]:
    """Return the utterances and the features (T, F) of the dev part of a corpus by language, for `validate`."""
    dev = {language: load_corpus(folder, language=language, split="dev") for language in languages}
    return dev, {
        language: [model.features(u.audio()).cpu() for u in utterances] for language, utterances in dev.items()
    }


def optimise(
    model: ConformerModel,
    recipe: Recipe,
    work: Path,
    fingerprint: str,
    objective: Callable[[int], dict[str, Tensor]],
    validated: Callable[[int], dict[str, float]],
) -> None:
    """Train a network for the steps of a recipe; resume from a checkpoint if there is one.

    Args:
        model: its network is trained in place.
        work: the folder of the checkpoint and of the log.
        fingerprint: of everything but the schedule that determines the run.
        objective: returns the losses of a step: "loss", which is minimised, and others for the log. Its random numbers
            may depend only on the step, or be those of torch, which are seeded for each step.
        validated: returns the scores on dev after a number of steps.

    Raises:
        SystemExit: the checkpoint has another fingerprint.
    """
    network, checkpoint = model.network, work / CHECKPOINT
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-3)
    step, elapsed, log = 0, 0.0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if state.get("begun", fingerprint) != fingerprint:
            raise SystemExit(
                f"{work} holds a checkpoint of another recipe or other training data: move it away to start again."
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed, log = state["step"], state["seconds"], state["log"]
        print(f"{recipe.name}: resuming at step {step} of {recipe.steps}", flush=True)
    started = saved = time.monotonic()
    while step < recipe.steps:
        # The random numbers of a step depend only on the step, so a resumed run equals an uninterrupted one.
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        network.train()
        parts = objective(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, recipe)
        optimizer.zero_grad()
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = elapsed + time.monotonic() - started
        if step % 50 == 0 or step == recipe.steps:
            log.append(
                {"step": step, "seconds": round(seconds, 1), **{k: round(v.item(), 4) for k, v in parts.items()}}
            )
            if step % recipe.validate_every == 0 or step == recipe.steps:
                network.eval()
                log[-1] |= validated(step)
            print(f"{recipe.name}: " + ", ".join(f"{key} {value}" for key, value in log[-1].items()), flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step == recipe.steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(checkpoint) as temporary:
                torch.save(state | {"begun": fingerprint, "step": step, "seconds": seconds, "log": log}, temporary)
            pd.DataFrame(log).to_csv(work / "log.csv", index=False)
            saved = time.monotonic()


def export(model: ConformerModel, recipe: Recipe, work: Path, folder: Path) -> None:
    """Write a trained model to `folder`, with float16 weights to halve the size; `load_model` computes in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.network.half().save_pretrained(folder)
    (folder / "spm.model").write_bytes((work / "spm.model").read_bytes())
    (folder / "training_log.csv").write_bytes((work / "log.csv").read_bytes())
    print(f"{recipe.name}: written to {folder}", flush=True)


def select_recipes(names: list[str], parser: argparse.ArgumentParser) -> list[Recipe]:
    """Return the recipes with these names; an unknown name is an error of the command line."""
    unknown = set(names) - set(RECIPES)
    if unknown:
        parser.error(f"there is no recipe for {', '.join(sorted(unknown))}: choose among {', '.join(RECIPES)}")
    return [RECIPES[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=SHIPPED, help=f"of {', '.join(RECIPES)}; default: {' '.join(SHIPPED)}"
    )
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of features and models; default: data")
    parser.add_argument(
        "--dev", type=Path, help="corpus folder whose dev part is used for validation; default: that of --data"
    )
    parser.add_argument("--steps", type=int, help="stretch or shorten the schedule to this number of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    for recipe in select_recipes(arguments.models, parser):
        if arguments.steps:
            scale = arguments.steps / recipe.steps
            recipe = replace(recipe, schedule=tuple((round(step * scale), rate) for step, rate in recipe.schedule))
        train(recipe, arguments.data, arguments.device, arguments.dev)


if __name__ == "__main__":
    main()
