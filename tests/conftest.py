"""A tiny model, a tiny corpus and hand-made maps, so that tests run in seconds without the shipped data."""

import csv
import hashlib
import json
import random
import shutil
from math import gcd
from types import SimpleNamespace
from xml.etree import ElementTree

import av
import numpy as np
import platformdirs
import pytest
import sentencepiece
import soundfile
import torch
from scipy.signal import resample_poly
from transformers.utils import logging

from xattn.analysis.reliability import half_maps, split_half_reliability
from xattn.attribution.estimators import estimate
from xattn.attribution.occlusion import Partition
from xattn.audio import SAMPLE_RATE
from xattn.data.corpus import load_corpus
from xattn.figures import save
from xattn.maps import build, drop_special_tokens, frame_times, frames_of_steps, masks_of
from xattn.models import load_model
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration

SENTENCES = {
    "en": ("the dog sleeps", "a cat sees the bird", "where does the dog sleep", "yes it is", "the bird sings"),
    "it": ("il cane dorme", "una gatta vede il merlo", "dove dorme il cane", "sì lo è", "il merlo canta"),
}
END = 2  # </s>


def tiny_network(seed=0, **options):
    """A random Conformer of width 16 with 2 + 2 layers, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 40,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "conv_channels": 32,
        "ctc_encoder_layer": 1,
        "final_ctc": True,
        "max_target_positions": 16,
        "tie_word_embeddings": True,
        "language_ids": {"en": 4, "it": 5},
    }
    network = ConformerForConditionalGeneration(ConformerConfig(**settings | options)).eval()
    with torch.no_grad():
        tokens = network.decoder.embed_tokens.weight.normal_(std=0.4)
        network.decoder.layer_norm.bias += 2 * tokens[END]  # so that some outputs end early
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if name.endswith(("u_bias", "v_bias", "batchnorm.bias", "running_mean")):
                value.normal_()
            elif name.endswith(("batchnorm.weight", "running_var")):
                value.uniform_(0.5, 2.0)
            elif name.startswith("decoder") and "attn." in name and name.endswith("weight"):
                value.normal_(std=0.5)  # an untrained decoder hardly uses the audio, and every map would be flat
    return network


@pytest.fixture(scope="session", autouse=True)
def quiet():
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """A folder in the place of the user's cache, where `explain` leaves scores."""
    folder = tmp_path_factory.mktemp("user-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platformdirs, "user_cache_path", lambda name: folder / name)
        yield folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A model folder like those of `recipes.train`: configuration, weights and SentencePiece model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_network().save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for texts in SENTENCES.values() for text in texts),
        model_prefix=str(folder / "spm"),
        vocab_size=40,
        model_type="unigram",
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<lang:en>", "<lang:it>"],
        num_threads=1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def model(tiny_folder):
    return load_model(tiny_folder)


def write_corpus(folder, utterances):
    """Write FLAC audio, manifest.csv and words.csv of (id, split, language, transcript, translation)."""
    (folder / "audio").mkdir(parents=True)
    manifest = [["id", "split", "language", "audio", "duration", "transcript", "translation", "sha256"]]
    words = [["id", "word", "start", "end"]]
    for seed, (name, split, language, transcript, translation) in enumerate(utterances):
        rng = np.random.default_rng(seed)
        time = np.arange(round((0.45 + 0.07 * seed) * SAMPLE_RATE)) / SAMPLE_RATE
        sweep = 0.3 * np.sin(2 * np.pi * (200 + rng.uniform(500, 3000) * time) * time) * np.sin(9 * time) ** 2
        samples = (2**15 * (sweep + 0.005 * rng.standard_normal(time.size))).astype(np.int16)
        soundfile.write(folder / f"audio/{name}.flac", samples, SAMPLE_RATE)
        sha256 = hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
        seconds = time.size / SAMPLE_RATE
        manifest.append([name, split, language, f"audio/{name}.flac", seconds, transcript, translation, sha256])
        spoken = transcript.split()
        edges = np.linspace(0, seconds, len(spoken) + 1).round(3)
        words += [
            [name, word, *edge] for word, edge in zip(spoken, zip(edges[:-1], edges[1:], strict=True), strict=True)
        ]
    for name, rows in (("manifest.csv", manifest), ("words.csv", words)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def encode(path, samples, rate, codec, codec_rate=None, quality=None, options=None):
    """Write mono samples with FFmpeg, at a variable bit rate if a quality is given."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=codec_rate or rate)
        stream.layout = "mono"
        if quality is not None:
            stream.codec_context.qscale = True
            stream.codec_context.global_quality = 118 * quality  # FFmpeg's unit of quality (FF_QP2LAMBDA)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for source in (frame, None):
            container.mux(stream.encode(source))


def write_europarl(root, source, target, split, speeches):
    """Write one direction in the layout of EuroParl-ST 1.1: m4a speeches, segments.lst and texts.

    speeches: by name, (samples at 16 kHz, rate of the m4a, [(start, end, transcript, translation), ...]).
    """
    (root / source / "audios").mkdir(parents=True, exist_ok=True)
    texts = root / source / target / split
    texts.mkdir(parents=True)
    lines = []
    for name, (samples, rate, segments) in speeches.items():
        divisor = gcd(rate, SAMPLE_RATE)
        resampled = resample_poly(samples, rate // divisor, SAMPLE_RATE // divisor).astype(np.float32)
        encode(root / source / "audios" / f"{name}.m4a", resampled, rate, "aac")
        lines += [(f"{name} {start:.2f} {end:.2f}", first, second) for start, end, first, second in segments]
    for kind, column in zip(("lst", source, target), zip(*lines, strict=True), strict=True):
        (texts / f"segments.{kind}").write_text("".join(f"{line}\n" for line in column), encoding="utf-8")


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A SentencePiece model and a vocabulary of 40 ids in a different order."""
    folder = tmp_path_factory.mktemp("vocabulary")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for texts in SENTENCES.values() for text in texts),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=39,
        user_defined_symbols=["<lang:en>", "<lang:it>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [processor.id_to_piece(token) for token in range(39) if processor.id_to_piece(token) not in special]
    random.Random(0).shuffle(pieces)
    (folder / "vocab.json").write_text(json.dumps({piece: token for token, piece in enumerate([*special, *pieces])}))
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Two dev and two test utterances in English, one of each in Italian: FLAC audio, manifest and word times."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    pairs = list(zip(*SENTENCES.values(), strict=True))
    english = [(f"en-{split}-{i}", split, "en", *pairs[i]) for split in ("dev", "test") for i in range(2)]
    italian = [(f"it-{split}-0", split, "it", *pairs[2][::-1]) for split in ("dev", "test")]
    write_corpus(folder, english + italian)
    return folder


@pytest.fixture(scope="session")
def utterances(corpus_folder):
    return load_corpus(corpus_folder, language="en", split="test")


def random_maps(seed=0, utterance="made-1", tokens=("▁the", "▁dog", "▁sleep", "s", "</s>"), frames=22):
    """Random maps with the variables, axes and attributes of `xattn.explain`, of an input of `frames` x 8 cells."""
    rng = np.random.default_rng(seed)
    steps, mels = -(-frames // 4), 8
    grid = np.add.outer(8 * (np.arange(frames) // 2), np.arange(mels))
    levels = np.stack([np.unique(labels, return_inverse=True)[1] for labels in (grid, grid // 2)])
    partition = Partition.of(levels)
    counts = rng.integers(0, 40, partition.units)
    attention = rng.dirichlet(np.ones(steps), (2, 3, len(tokens)))
    first = 4 * np.arange(steps)
    return build(
        {
            "cross_attention": attention.astype(np.float32),
            "encoder_saliency": rng.exponential(size=(len(tokens), steps)),
            "features": rng.standard_normal((frames, mels)).astype(np.float32),
            "segment_score": counts * rng.exponential(size=(len(tokens), partition.units)),
            "segment_count": counts,
            "segmentation": partition.labels,
        },
        tokens=tokens,
        times=frame_times(frames),
        step_frames=np.stack([first, first + 4], axis=1),
        bands=100.0 * (1 + np.arange(mels)),
        attributes={"model": "tiny", "setting": "en", "utterance": utterance, "seed": seed}
        | {"estimator": "mean", "input_reliability": 0.64, "encoder_reliability": 0.81},
    )


def scored_maps(seed=0, utterance="made-1", number=60, estimator="mean", partition="superpixels"):
    """`random_maps` with saliency from the scores of `number` perturbations of each place, and with its halves."""
    maps = random_maps(seed, utterance)
    tokens = maps.sizes["token"]
    kept = maps.drop_vars(["input_saliency", "encoder_saliency", "segment_score", "segment_count"])
    kept = kept.assign_attrs(estimator=estimator, partition=partition, input_p=0.5, encoder_p=0.7)
    arrays = {name: variable.values for name, variable in kept.data_vars.items()}
    step_frames = frames_of_steps(maps, maps.time.values)
    for place in ("input", "encoder"):
        scores = np.zeros((number, tokens), dtype=np.float32)
        masks = masks_of(kept.assign({f"{place}_scores": ((f"{place}_mask", "token"), scores)}), place)
        _, hidden = masks.draw(0, number)
        rng = np.random.default_rng([seed, *place.encode()])
        weights = rng.exponential(size=(masks.partition.units, tokens)) ** 2
        scores = (hidden @ weights / 10 + rng.exponential(size=scores.shape) / 2).astype(np.float32)
        units, halves = estimate(scores, masks, estimator), half_maps(scores, masks, step_frames, estimator)
        arrays |= {f"{place}_scores": scores, f"{place}_halves": halves.astype(np.float32)}
        arrays |= {"encoder_saliency": units.cells(masks.partition.labels)} if place == "encoder" else units.compact()
    scored = build(
        arrays,
        tokens=maps.token.values,
        times=maps.time.values,
        step_frames=step_frames,
        bands=maps.mel.values,
        attributes=kept.attrs,
    )
    spoken = drop_special_tokens(scored)
    for place in ("input", "encoder"):
        scored.attrs[f"{place}_reliability"] = split_half_reliability(spoken[f"{place}_halves"].values)
    return scored


class GivenMasks:
    """Masks from a list: the level of each and whether it hides each of that level's units."""

    def __init__(self, partition, rows):
        rows, self.partition = list(rows), partition
        self.levels, self.number = np.array([level for level, _ in rows]), len(rows)
        self.hidden = np.zeros((len(rows), partition.units), dtype=bool)
        for row, (level, units) in enumerate(rows):
            self.hidden[row, partition.bounds[level] : partition.bounds[level + 1]] = units

    def draw(self, start, stop):
        return self.levels[start:stop], self.hidden[start:stop]


def listed(masks):
    """The level of each mask and whether it hides each of that level's units, one after the other."""
    bounds = masks.partition.bounds
    levels, hidden = masks.draw(0, masks.number)
    return [(level, row[bounds[level] : bounds[level + 1]]) for level, row in zip(levels, hidden, strict=True)]


def halves_by_hand(maps, place):
    """The saliency from each half of the perturbations: runs of one perturbation of each level take turns."""
    masks, scores = masks_of(maps, place), maps[f"{place}_scores"].values
    everything, labels = listed(masks), masks.partition.labels
    for start in (0, 1):
        rows = [row for row in range(len(scores)) if row // len(labels) % 2 == start]
        half = GivenMasks(masks.partition, [everything[row] for row in rows])
        yield maps[f"{place}_saliency"].copy(data=estimate(scores[rows], half, maps.estimator).cells(labels))


@pytest.fixture
def made():
    """Makers of test material: `made.maps(...)`, `made.scored(...)`, `made.network(...)` and `made.corpus(...)`."""
    return SimpleNamespace(maps=random_maps, scored=scored_maps, network=tiny_network, corpus=write_corpus)


def counted(model, monkeypatch, method):
    """Record how many rows a method of the model is called with."""
    calls, original = [], getattr(model, method)

    def noting(first, *others):
        calls.append(len(first))
        return original(first, *others)

    monkeypatch.setattr(model, method, noting)
    return calls


class Clock:
    """A clock in the place of the module `time`, on which every perturbation takes a second."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def slow(self, score):
        def slowly(keep):
            self.now += len(keep)
            return score(keep)

        return slowly


def drawn(figure, folder):
    """Every line of text in a figure, as its SVG file has it; the file is left in the folder."""
    save(figure, folder / "drawn.svg")
    elements = ElementTree.parse(folder / "drawn.svg").iter("{http://www.w3.org/2000/svg}text")
    # A line with a formula has an element for each character.
    return ["".join(each.text for each in line).replace("\xa0", " ") or line.text for line in elements]


def without_seconds(maps):
    return maps.assign_attrs(seconds=None)


@pytest.fixture(scope="module")
def pretrained(folder):
    """The model in the module's own fixture `folder`, a checkpoint in transformers' format."""
    return load_model(folder)


@pytest.fixture
def audio(utterances):
    return utterances[1].audio()


BROWSERS = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Its event loop would be in the way of other modules, so each module has its own."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"There is no browser: none of {', '.join(BROWSERS)} is installed.")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()
