"""Generate the miniature corpus: English and Italian, read by synthetic voices in noisy rooms, with exact word times.

`python -m recipes.make_corpus --data data` writes for each language
    data/manifest.csv, data/words.csv, data/audio/<language>/<split>/<id>.flac   dev and test, kept in the repository
    data/train/<language>.npy, data/train/<language>.csv   the training part as log-Mel features, without audio
and updates the statistics in data/README.md when it writes dev and test. The same seed gives the same samples on the
same machine, for any number of processes: each utterance has its own random generator, seeded with (seed, split,
language, index).
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from recipes.features import energies, in_parallel, with_progress, write_features, write_table
from recipes.grammar import Sentence, split
from recipes.room import NOISES, Talkers, noise, reverberate
from recipes.synthesise import HELD_OUT_VOICES, PUNCTUATION, VOICES, Word, speak
from xattn.audio import FRAME_SECONDS, SAMPLE_RATE
from xattn.files import replacing, write_whole

SEED = 2024
SENTENCES = {"train": 18_000, "dev": 40, "test": 100}
LANGUAGES = ("en", "it")
FIELD = {"en": "english", "it": "italian"}  # of a `Sentence`
TALKER_SENTENCES = 40  # training sentences that are synthesised for babble and speech-shaped noise

RATES = (140, 200)  # words per minute
PITCHES = (30, 70)  # of eSpeak NG's 0 to 100
SILENCE = (0.1, 0.4)  # seconds before and after the speech
RT60 = (0.1, 0.4)  # seconds
DIRECT_TO_REVERBERANT = (3.0, 12.0)  # dB
TRAIN_SNR = (0.0, 25.0)  # dB
TEST_SNRS = (0, 5, 10, 15, 20)  # dB, for dev and test
PEAK = 0.025  # of full scale; every doubling of the noise would cost FLAC one more bit for each sample

MANIFEST = (
    *("id", "split", "language", "audio", "duration", "transcript", "translation"),
    *("voice", "rate", "pitch", "noise", "snr", "sha256"),
)
TRAIN_TABLE = ("id", "start_frame", "frames", "transcript", "translation", "voice", "snr", "sha256")
WORDS = ("id", "word", "start", "end")
RANDOM_STREAMS = ("train", "dev", "test", "talkers")  # the position is part of the seed of a random generator
CARD_MARKS = "<!-- statistics: written by recipes/make_corpus.py -->", "<!-- end of statistics -->"


@dataclass(frozen=True)
class Recording:
    """An utterance as it is stored.

    pcm: int16 (samples,) at 16 kHz; words: with their times; row: of the manifest.
    """

    pcm: np.ndarray
    words: list[Word]
    row: dict


def record(language: str, part: str, seed: int, index: int) -> Recording:
    """Synthesise utterance `index` (from 0) of a split, add reverberation and noise, and scale its peak to PEAK.

    Dev and test cycle through the held-out voices, NOISES and TEST_SNRS; training draws voice, noise and SNR at random.
    """
    sentence = _sentences(seed)[part][index]
    transcript, translation = sentence.english, sentence.italian
    if language == "it":
        transcript, translation = translation, transcript
    rng = _generator(seed, part, language, index)
    if part == "train":
        voice = VOICES[language][rng.integers(len(VOICES[language]))]
        kind, snr = NOISES[rng.integers(len(NOISES))], round(rng.uniform(*TRAIN_SNR), 1)
    else:
        # Five SNRs share no factor with four voices or four noises, so every combination with an SNR occurs.
        voices = HELD_OUT_VOICES[language]
        voice, kind = voices[index % len(voices)], NOISES[index // len(voices) % len(NOISES)]
        snr = TEST_SNRS[index % len(TEST_SNRS)]
    rate, pitch = (int(rng.integers(low, high + 1)) for low, high in (RATES, PITCHES))
    dry, words = speak(transcript, voice, rate, pitch, seed=int(rng.integers(1, 2**31)))
    before, after = (round(rng.uniform(*SILENCE) * SAMPLE_RATE) for _ in range(2))
    speech = reverberate(np.pad(dry, (before, after)), rng.uniform(*RT60), rng.uniform(*DIRECT_TO_REVERBERANT), rng)
    power = np.mean(speech[before : before + dry.size] ** 2)
    noisy = speech + np.sqrt(power / 10 ** (snr / 10)) * noise(kind, speech.size, _talkers(language, seed), rng)
    pcm = np.rint(noisy * (PEAK * 2**15 / np.abs(noisy).max())).astype(np.int16)
    digits = len(str(SENTENCES["train"])) if part == "train" else 4
    name = f"{language}-{part}-{index + 1:0{digits}}"
    row = {
        **{"id": name, "split": part, "language": language, "audio": f"audio/{language}/{part}/{name}.flac"},
        **{"duration": pcm.size / SAMPLE_RATE, "transcript": transcript, "translation": translation},
        **{"voice": voice, "rate": rate, "pitch": pitch, "noise": kind, "snr": snr},
        "sha256": hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest(),
    }
    shift = before / SAMPLE_RATE
    return Recording(pcm, [Word(w.text, round(w.start + shift, 3), round(w.end + shift, 3)) for w in words], row)


def make_dev_and_test(data: Path, language: str, seed: int, processes: int, overwrite: bool) -> str | None:
    """Write the dev and test parts of a language; if the manifest has them already, compare the samples with it.

    overwrite: write them even if the manifest has them.

    Returns:
        None, or an error message if the samples differ from the manifest; no file is changed then.
    """
    recordings = [
        recording
        for part in ("dev", "test")
        for recording in in_parallel(partial(record, language, part, seed), range(SENTENCES[part]), processes)
    ]
    rows = pd.DataFrame([recording.row for recording in recordings], columns=MANIFEST)
    manifest = _read_table(data / "manifest.csv", MANIFEST)
    stored = manifest[manifest.language == language]
    if len(stored) and not overwrite:
        both = stored[["id", "sha256"]].merge(rows[["id", "sha256"]], on="id", how="outer")
        differing = both.id[both.sha256_x != both.sha256_y]
        if len(differing):
            return (
                f"The samples of {len(differing)} of {len(both)} utterances (first: {differing.iloc[0]}) differ from "
                f"{data / 'manifest.csv'} (an edited recipe or another platform can cause this): dev and test are "
                "unchanged; use --overwrite to replace them."
            )
        print(f"{language}: dev and test agree with {data / 'manifest.csv'} ({len(rows)} utterances)", flush=True)
        return None
    folder = data / "audio" / language
    for recording in recordings:
        with replacing(data / recording.row["audio"]) as path:
            soundfile.write(path, recording.pcm, SAMPLE_RATE, format="FLAC")
    for path in set(folder.glob("*/*.flac")) - {data / audio for audio in rows.audio}:
        path.unlink()
    words = _read_table(data / "words.csv", WORDS)
    spoken = [(r.row["id"], word.text, word.start, word.end) for r in recordings for word in r.words]
    write_table(
        data / "words.csv", words[~words.id.str.startswith(f"{language}-")], pd.DataFrame(spoken, columns=WORDS)
    )
    write_table(data / "manifest.csv", manifest[manifest.language != language], rows)
    size = sum(path.stat().st_size for path in folder.glob("*/*.flac"))
    print(f"{language}: dev and test written, {len(rows)} utterances, {size / 1e6:.1f} MB of FLAC", flush=True)
    return None


def make_train(data: Path, language: str, seed: int, sentences: int, processes: int) -> None:
    """Write the training part of a language: log-Mel features and a table, see `recipes.features`."""
    utterances = in_parallel(partial(_train_features, language, seed), range(sentences), processes)
    utterances = with_progress(utterances, f"{language}: train", sentences)
    write_features(data / "train", language, utterances, TRAIN_TABLE)


def statistics(data: Path) -> str:
    """Return a Markdown table of statistics for each language and split, from the manifest and the training tables."""
    parts = []
    manifest = _read_table(data / "manifest.csv", MANIFEST)
    for language in LANGUAGES:
        table = data / "train" / f"{language}.csv"
        if table.is_file():
            train = _read_table(table, TRAIN_TABLE)
            parts.append((language, "train", train.assign(duration=train.frames * FRAME_SECONDS)))
        rows = manifest[manifest.language == language]
        parts.extend((language, part, rows[rows.split == part]) for part in ("dev", "test") if len(rows))
    lines = [
        "| language | split | utterances | seconds | words | types | words per sentence | voices | SNR (dB) | sha256 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for language, part, rows in parts:
        words = rows.transcript.str.lower().str.split()
        types = {word.strip(PUNCTUATION) for sentence in words for word in sentence}
        digest = hashlib.sha256("".join(rows.sha256).encode()).hexdigest()
        lines.append(
            f"| {language} | {part} | {len(rows):,} | {rows.duration.sum():,.0f} | {words.str.len().sum():,} "
            f"| {len(types):,} | {words.str.len().mean():.1f} ({words.str.len().min()}-{words.str.len().max()}) "
            f"| {rows.voice.nunique()} | {rows.snr.min():g}-{rows.snr.max():g} | `{digest}` |"
        )
    return "\n".join(lines)


def update_card(data: Path) -> None:
    """Replace the statistics between the two marks of data/README.md. ValueError: a mark is missing."""
    path = data / "README.md"
    text = path.read_text(encoding="utf-8")
    before, opening, rest = text.partition(CARD_MARKS[0])
    _, closing, after = rest.partition(CARD_MARKS[1])
    if not (opening and closing):
        raise ValueError(f"{path} lacks the lines {' and '.join(CARD_MARKS)}: restore them around the statistics.")
    new = f"{before}{opening}\n{statistics(data)}\n{closing}{after}"
    write_whole(path, new.encode())


@cache
def _sentences(seed: int) -> dict[str, list[Sentence]]:
    return split(**SENTENCES, seed=seed)


@cache
def _talkers(language: str, seed: int) -> Talkers:
    """Synthesise training sentences with each training voice in turn, at equal loudness."""
    rng = _generator(seed, "talkers", language, 0)
    spoken = []
    for index, sentence in enumerate(_sentences(seed)["train"][:TALKER_SENTENCES]):
        voice = VOICES[language][index % len(VOICES[language])]
        rate, pitch = (int(rng.integers(low, high + 1)) for low, high in (RATES, PITCHES))
        samples, _ = speak(getattr(sentence, FIELD[language]), voice, rate, pitch, seed=int(rng.integers(1, 2**31)))
        spoken.append(samples / np.sqrt(np.mean(samples**2)))
    return Talkers(np.concatenate(spoken))


def _generator(seed: int, part: str, language: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, RANDOM_STREAMS.index(part), LANGUAGES.index(language), index])


def _train_features(language: str, seed: int, index: int) -> tuple[dict, np.ndarray]:
    recording = record(language, "train", seed, index)
    return recording.row, energies((recording.pcm / 2**15).astype(np.float32))


def _read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=columns, dtype=str)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the corpus; default: data")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, help="default: both")
    parser.add_argument("--sentences", type=int, default=SENTENCES["train"], help="training sentences; 0 writes none")
    parser.add_argument("--overwrite", action="store_true", help="replace dev and test")
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    options = parser.parse_args(arguments)
    if not 0 <= options.sentences <= SENTENCES["train"]:
        parser.error(f"--sentences is {options.sentences}: give a number from 0 to {SENTENCES['train']}.")
    writes = options.overwrite or not (options.data / "manifest.csv").is_file()
    problems = []
    for language in options.languages:
        problems.append(make_dev_and_test(options.data, language, options.seed, options.processes, options.overwrite))
        if options.sentences:
            make_train(options.data, language, options.seed, options.sentences, options.processes)
    if writes:
        update_card(options.data)
    if any(problems):
        sys.exit("\n".join(filter(None, problems)))


if __name__ == "__main__":
    main()
