"""The corpus command on a few sentences, and the committed corpus against its manifest."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from recipes import make_corpus
from recipes.synthesise import HELD_OUT_VOICES, PUNCTUATION, VOICES
from xattn.audio import SAMPLE_RATE, load_audio, log_mel

DATA = Path(__file__).parents[1] / "data"
SMALL = {"train": 9, "dev": 3, "test": 5}


def sha256(path):
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == SAMPLE_RATE and samples.ndim == 1
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()


@pytest.fixture
def few_sentences(monkeypatch):
    monkeypatch.setattr(make_corpus, "SENTENCES", SMALL)
    make_corpus._sentences.cache_clear()
    make_corpus._talkers.cache_clear()
    yield
    make_corpus._sentences.cache_clear()
    make_corpus._talkers.cache_clear()


@pytest.fixture
def made(few_sentences, tmp_path):
    (tmp_path / "README.md").write_text("above\n" + "\n".join(make_corpus.CARD_MARKS) + "\nbelow\n")
    make_corpus.main(["--data", str(tmp_path)])
    return tmp_path


def test_command_writes_audio_tables_and_statistics(made):
    manifest, words = pd.read_csv(made / "manifest.csv"), pd.read_csv(made / "words.csv")
    assert tuple(manifest.columns) == make_corpus.MANIFEST
    assert manifest.groupby(["language", "split"]).size().to_dict() == {
        (language, part): SMALL[part] for language in ("en", "it") for part in ("dev", "test")
    }
    assert manifest.id.iloc[[0, -1]].tolist() == ["en-dev-0001", "it-test-0005"]
    for row in manifest.itertuples():
        assert sha256(made / row.audio) == row.sha256
        assert words[words.id == row.id].word.tolist() == [word.strip(PUNCTUATION) for word in row.transcript.split()]
    english, italian = (manifest[manifest.language == language].reset_index() for language in ("en", "it"))
    assert (english.transcript == italian.translation).all() and (italian.transcript == english.translation).all()
    card = (made / "README.md").read_text()
    assert card.startswith("above\n") and card.endswith("below\n") and card.count("| en | test | 5 |") == 1
    assert not list(made.rglob("*.part"))


def test_training_features_match_the_samples(made):
    for language in ("en", "it"):
        features = np.load(made / "train" / f"{language}.npy", mmap_mode="r")
        table = pd.read_csv(made / "train" / f"{language}.csv")
        assert features.dtype == np.float16 and features.shape == (table.frames.sum(), 80) and len(table) == 9
        assert table.start_frame.tolist() == [0, *table.frames.cumsum()[:-1]]
        for index, row in enumerate(table.itertuples()):
            recording = make_corpus.record(language, "train", make_corpus.SEED, index)
            assert (recording.row["id"], recording.row["sha256"]) == (row.id, row.sha256)
            expected = log_mel((recording.pcm / 2**15).astype(np.float32))
            np.testing.assert_allclose(features[row.start_frame :][: row.frames], expected, rtol=5e-4)


def test_second_run_with_other_processes_agrees_and_changes_no_file(made, capsys):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    make_corpus.main(["--data", str(made), "--processes", "1"])
    assert capsys.readouterr().out.count("dev and test agree") == 2
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_differences_are_reported_and_overwritten_only_on_request(made, capsys):
    manifest = made / "manifest.csv"
    good = manifest.read_text()
    digest = pd.read_csv(manifest).set_index("id").sha256["en-test-0002"]
    manifest.write_text(good.replace(digest, "0" * 64))
    tampered = manifest.read_text()
    with pytest.raises(SystemExit, match=r"1 of 8 utterances \(first: en-test-0002\).*--overwrite"):
        make_corpus.main(["--data", str(made), "--sentences", "0"])
    assert manifest.read_text() == tampered
    make_corpus.main(["--data", str(made), "--sentences", "0", "--overwrite"])
    assert manifest.read_text() == good


def test_making_one_language_keeps_the_other(made):
    before = {path: path.read_bytes() for path in made.glob("audio/en/**/*.flac")}
    (made / "audio/it/test/it-test-0009.flac").write_bytes(b"left over")
    tables = [(made / name).read_text() for name in ("manifest.csv", "words.csv")]
    make_corpus.main(["--data", str(made), "--languages", "it", "--sentences", "0", "--overwrite"])
    assert before and {path: path.read_bytes() for path in made.glob("audio/en/**/*.flac")} == before
    assert [(made / name).read_text() for name in ("manifest.csv", "words.csv")] == tables
    assert not (made / "audio/it/test/it-test-0009.flac").exists()


def test_too_many_sentences_are_refused(few_sentences, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_corpus.main(["--data", str(tmp_path), "--sentences", "10"])
    assert "--sentences is 10: give a number from 0 to 9" in capsys.readouterr().err


@pytest.mark.parametrize(("language", "part", "index"), [("en", "dev", 1), ("it", "test", 4), ("en", "train", 0)])
def test_signal_to_noise_ratio_matches_the_manifest(language, part, index, few_sentences, monkeypatch):
    recording = make_corpus.record(language, part, 1, index)
    added = []
    original = make_corpus.noise

    def silent(*arguments):
        added.append(original(*arguments))
        return np.zeros_like(added[0])

    monkeypatch.setattr(make_corpus, "noise", silent)
    clean = make_corpus.record(language, part, 1, index)
    parts = np.stack([clean.pcm, added[0]], axis=1).astype(float)
    (speech_gain, noise_gain), *_ = np.linalg.lstsq(parts, recording.pcm.astype(float), rcond=None)
    residual = recording.pcm - parts @ (speech_gain, noise_gain)
    assert np.std(residual) < 1.5  # rounding, in steps of 16 bits
    span = slice(*(round(time * SAMPLE_RATE) for time in (clean.words[0].start, clean.words[-1].end)))
    power = np.mean((speech_gain * parts[span, 0]) ** 2) / noise_gain**2
    assert 10 * np.log10(power) == pytest.approx(recording.row["snr"], abs=0.3)


def test_recordings_differ_and_have_noise_throughout(few_sentences):
    recordings = [make_corpus.record("en", part, 1, index) for part, count in SMALL.items() for index in range(count)]
    assert len({recording.row["sha256"] for recording in recordings}) == sum(SMALL.values())
    for recording in recordings:
        assert log_mel((recording.pcm / 2**15).astype(np.float32)).min() > -10  # digital silence is at -15.9
        assert np.abs(recording.pcm).max() == round(make_corpus.PEAK * 2**15)
        assert 0.1 <= recording.words[0].start <= 0.45
        assert 0.1 <= recording.row["duration"] - recording.words[-1].end <= 0.6


def test_committed_corpus_is_complete_and_balanced():
    manifest, words = pd.read_csv(DATA / "manifest.csv"), pd.read_csv(DATA / "words.csv", keep_default_na=False)
    assert manifest.groupby(["language", "split"]).size().to_dict() == {
        (language, part): make_corpus.SENTENCES[part] for language in ("en", "it") for part in ("dev", "test")
    }
    words_of = dict(list(words.groupby("id")))
    for row in manifest.itertuples():
        assert sha256(DATA / row.audio) == row.sha256
        timed = words_of[row.id]
        assert timed.word.tolist() == [word.strip(PUNCTUATION) for word in row.transcript.split()]
        edges = timed[["start", "end"]].to_numpy().ravel()
        assert edges[0] > 0 and edges[-1] < row.duration and (np.diff(edges) >= 0).all()
        assert (timed.end - timed.start > 0.02).all(), row.id
    for language, rows in manifest.groupby("language"):
        size = sum((DATA / audio).stat().st_size for audio in rows.audio)
        assert size < 9_000_000
        assert set(rows.voice) == set(HELD_OUT_VOICES[language]) and not set(rows.voice) & set(VOICES[language])
        for _, part in rows.groupby("split"):
            assert part.groupby(["voice", "snr"]).size().tolist() == [len(part) // 20] * 20
            assert part.groupby("noise").size().between(len(part) / 4 - 3, len(part) / 4 + 3).tolist() == [True] * 4


def test_committed_speech_is_louder_than_the_noise_before_it():
    manifest, words = pd.read_csv(DATA / "manifest.csv"), pd.read_csv(DATA / "words.csv", keep_default_na=False)
    quiet_room = manifest[(manifest.snr == 20) & (manifest.noise != "babble")]
    assert len(quiet_room) >= 12
    for row in quiet_room.itertuples():
        timed = words[words.id == row.id]
        power = load_audio(DATA / row.audio).astype(float) ** 2
        before, first = (round(SAMPLE_RATE * time) for time in (timed.start.iloc[0], timed.end.iloc[0]))
        assert 10 * np.log10(power[before:first].mean() / power[: before - 80].mean()) > 6, row.id
