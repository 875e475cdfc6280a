"""Reading recordings from a folder, a table, a Hugging Face dataset and corpora as they are distributed.

Everything runs without a network. XATTN_SPEECH can name a folder of real corpora, which are read too.
"""

import builtins
import io
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import encode
from datasets import Audio, Dataset, DatasetDict

import xattn
from xattn import (
    load_corpus,
    utterances_from_common_voice,
    utterances_from_dataset,
    utterances_from_folder,
    utterances_from_librispeech,
    utterances_from_table,
    utterances_from_timit,
)
from xattn.audio import SAMPLE_RATE, load_audio
from xattn.data.utterance import Word

SPEECH = Path(os.environ.get("XATTN_SPEECH") or "")
real_speech = pytest.mark.skipif(
    not os.environ.get("XATTN_SPEECH"), reason="set XATTN_SPEECH to a folder of real corpora"
)


def noise(seconds, rate=SAMPLE_RATE, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Three recordings of different formats and rates; two have transcripts."""
    folder = tmp_path / "recordings"
    (folder / "older").mkdir(parents=True)
    soundfile.write(folder / "b talk.wav", noise(0.5, 44_100), 44_100)
    soundfile.write(folder / "a.flac", noise(0.6), SAMPLE_RATE)
    encode(folder / "c.m4a", noise(0.7), SAMPLE_RATE, "aac")
    soundfile.write(folder / "older/d.wav", noise(0.5), SAMPLE_RATE)
    (folder / "a.txt").write_text("  the dog\n sleeps \n", encoding="utf-8-sig")
    (folder / "b talk.txt").write_text("yes, it is", encoding="utf-8")
    (folder / ".hidden").touch()
    return folder


@pytest.fixture
def missing(monkeypatch):
    """Make a package impossible to import."""

    def hide(package):
        original = builtins.__import__

        def without(name, *arguments):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}")
            return original(name, *arguments)

        monkeypatch.setattr(builtins, "__import__", without)

    return hide


def test_recordings_in_a_folder(folder):
    utterances = utterances_from_folder(folder, "en")
    assert [(u.id, u.transcript) for u in utterances] == [("a", "the dog sleeps"), ("b talk", "yes, it is"), ("c", "")]
    assert [u.audio_path.name for u in utterances] == ["a.flac", "b talk.wav", "c.m4a"]
    for utterance, seconds in zip(utterances, (0.6, 0.5, 0.7), strict=True):
        assert utterance.language == "en"
        assert utterance.duration == pytest.approx(seconds)
        np.testing.assert_array_equal(utterance.audio(), load_audio(utterance.audio_path))
        padding = 1023 if utterance.audio_path.suffix == ".m4a" else 0  # AAC fills its last frame of 1024 samples
        assert 0 <= utterance.audio().size - round(seconds * SAMPLE_RATE) <= padding


@pytest.fixture
def stereo(tmp_path):
    """A recording with two different channels, in a folder and in a table."""
    channels = np.stack([noise(0.5), noise(0.5, seed=1)], axis=1)
    (tmp_path / "stereo").mkdir()
    soundfile.write(tmp_path / "stereo" / "a.wav", channels, SAMPLE_RATE, subtype="FLOAT")
    return tmp_path / "stereo", channels


def test_channel_of_recordings_in_a_folder(stereo):
    folder, channels = stereo
    for channel, expected in ((None, channels.mean(axis=1)), (0, channels[:, 0]), (np.int64(1), channels[:, 1])):
        (utterance,) = utterances_from_folder(folder, "en", channel=channel)
        np.testing.assert_array_equal(utterance.audio(), expected)
        part = replace(utterance, end=0.25)
        np.testing.assert_array_equal(part.audio(), expected[: SAMPLE_RATE // 4])
    (utterance,) = utterances_from_folder(folder, "en", channel=2)
    with pytest.raises(ValueError, match=r"a\.wav has no channel 2: choose one from 0 to 1\."):
        utterance.audio()
    for channel in ("left", True, -1, 0.0):
        with pytest.raises(
            ValueError, match=r"The channel of .*a\.wav is .*: give its number, counted from 0, or None"
        ):
            utterances_from_folder(folder, "en", channel=channel)


def test_channel_of_recordings_in_a_table(stereo):
    folder, channels = stereo
    table = folder / "t.csv"
    table.write_text("id,audio,language,channel\none,a.wav,en,1\ntwo,a.wav,en,\nthree,a.wav,en,0.0\n")
    assert [each.channel for each in utterances_from_table(table)] == [1, None, 0]
    assert [each.channel for each in utterances_from_table(table, channel=1)] == [1, 1, 0]
    for utterance, column in zip(utterances_from_table(table, channel=1), (1, 1, 0), strict=True):
        np.testing.assert_array_equal(utterance.audio(), channels[:, column])
    table.write_text("id,audio,language,channel\none,a.wav,en,left\n")
    with pytest.raises(ValueError) as error:
        utterances_from_table(table)
    assert str(error.value) == (
        f"{table} row 2 (id one) has 'left' as its channel: give its number, counted from 0, leave the cell empty for "
        "the average of all channels, or rename the column if it means something else."
    )


def test_utterances_from_a_folder_can_be_explained(folder, model):
    for utterance in utterances_from_folder(folder, "en")[:2]:
        maps = xattn.explain(model, utterance, occlusion=xattn.Occlusion(4, 4), progress=False)
        assert (maps.utterance, maps.reference) == (utterance.id, utterance.transcript)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("readme.txt", b"hello", r"readme\.txt has no recording of its name beside it: rename it, or put it elsewhere"),
        ("a.txt", b"\xe9", r"a\.txt is not encoded in UTF-8: save it again"),
        ("README.TXT", b"hello", r"README\.TXT has no recording of its name beside it: rename it, or put it elsewhere"),
        (
            "a.mp3",
            b"",
            r"a\.mp3 has the name of a\.flac, compared without case and in Unicode NFC: rename one of the rec",
        ),
        (
            "A.mp3",
            b"",
            r"a\.flac has the name of A\.mp3, compared without case and in Unicode NFC: rename one of the rec",
        ),
        ("a\\b.wav", b"", r"utterance id 'a\\\\b' cannot be part of a file name: choose"),
    ],
)
def test_file_that_is_no_recording_is_an_error(folder, name, content, message):
    if "\\" in name:
        shutil.copy(folder / "b talk.wav", folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        utterances_from_folder(folder, "en")


def test_recordings_that_cannot_be_read_are_listed_without_a_length(folder):
    """Runs leave them out by name, so that one of them does not end a corpus."""
    (folder / "notes.wav").write_bytes(b"%PDF")
    listed = {each.id: each for each in utterances_from_folder(folder, "en")}
    assert math.isnan(listed["notes"].duration) and listed["b talk"].duration > 0
    with pytest.raises(ValueError, match=r"notes\.wav cannot be read as audio: convert it"):
        listed["notes"].audio()
    table = write_table(folder / "table.csv", [ROWS[0] | {"audio": "notes.wav"}, ROWS[1]])
    assert [math.isnan(each.duration) for each in utterances_from_table(table)] == [True, False]


@pytest.mark.parametrize(
    ("recording", "text"),
    [
        ("A.WAV", "A.TXT"),
        ("A.WAV", "a.txt"),
        ("a.Wave", "A.txt"),
        ("perch\u00e9.wav", "perche\u0301.txt"),
        ("perche\u0301.wav", "PERCH\u00c9.TXT"),
        ("a.b.wav", "a.b.txt"),
    ],
)
def test_names_are_compared_without_case_and_in_nfc(tmp_path, recording, text):
    soundfile.write(tmp_path / recording, noise(0.5), SAMPLE_RATE, format="WAV")
    (tmp_path / text).write_text("hello")
    (utterance,) = utterances_from_folder(tmp_path, "en")
    assert (utterance.id, utterance.transcript) == (recording.rpartition(".")[0], "hello")


@pytest.mark.parametrize("second", ["PERCH\u00c9.wav", "perche\u0301.wav", "Perch\u00e9.FLAC", "PERCH\u00c9.txt"])
def test_ids_that_some_file_systems_take_for_one_are_refused(tmp_path, second):
    names = ["perch\u00e9.wav", "perch\u00e9.txt", second]
    for name in names:
        soundfile.write(tmp_path / name, noise(0.5), SAMPLE_RATE, format="WAV")
    if len([*tmp_path.iterdir()]) < len(names):
        pytest.skip("this file system takes the names for one")
    with pytest.raises(ValueError, match=r"compared without case and in Unicode NFC: rename one of the (record|trans)"):
        utterances_from_folder(tmp_path, "en")


OTHER_FILES = (
    *("a.srt", "a.json", "a.TextGrid", "a.lab", "a.vtt", "a.xml", "a.eaf", "A.WAV.bak", "notes.pdf", "README.md"),
    *("README", "LICENSE", "desktop.ini", "Thumbs.db", ".DS_Store", "._a.wav", ".wav", ".txt", "cover.jpg", "a.csv"),
)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_beside_recordings_are_ignored(folder, name):
    (folder / name).write_bytes(b"\xff\xfe\x00other")
    assert [utterance.id for utterance in utterances_from_folder(folder, "en")] == ["a", "b talk", "c"]


def test_a_transcript_in_utf_16(folder):
    (folder / "a.txt").write_text("perché no", encoding="utf-16")
    assert utterances_from_folder(folder, "it")[0].transcript == "perché no"


def test_folder_without_recordings_is_an_error(tmp_path):
    (tmp_path / "notes.md").touch()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="There is no recording in .*: give the folder that holds"):
            utterances_from_folder(folder, "en")


ROWS = [
    {"id": "1", "audio": "a.flac", "language": "en", "transcript": "the dog, sleeping", "target_language": "it"},
    {"id": "x é", "audio": "c.m4a", "language": "it", "translation": "a cat", "split": "test", "target_language": "en"},
]


def write_table(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_rows_of_a_table(folder, name):
    first, second = utterances_from_table(write_table(folder / name, ROWS))
    assert (first.id, first.language, first.transcript, first.translation) == ("1", "en", "the dog, sleeping", "")
    assert (second.id, second.language, second.transcript, second.split) == ("x é", "it", "", "test")
    assert second.reference("it-en") == "a cat" and first.target_language == "it"
    assert (first.duration, first.audio_path) == (0.6, folder / "a.flac")
    np.testing.assert_array_equal(second.audio(), load_audio(folder / "c.m4a"))


def test_parquet_can_have_numbers_as_ids_and_columns_of_other_types(folder):
    frame = pd.DataFrame({"id": [7], "audio": ["a.flac"], "language": ["en"], "snr": [np.nan], "vector": [[0.1, 0.2]]})
    frame.to_parquet(folder / "table.parquet")
    (utterance,) = utterances_from_table(folder / "table.parquet")
    assert utterance.id == "7"


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_rows_of_a_table_can_be_selected(folder, name):
    table = write_table(folder / name, [*ROWS, ROWS[1] | {"id": "3", "split": "dev"}])
    assert [u.id for u in utterances_from_table(table, language="it")] == ["x é", "3"]
    assert [u.id for u in utterances_from_table(table, language="it", split="dev")] == ["3"]
    message = rf"{name} has no utterance of language 'en' split 'dev': choose among en, it dev, it test\."
    with pytest.raises(ValueError, match=message):
        utterances_from_table(table, language="en", split="dev")


def test_durations_of_a_table_spare_the_recordings(folder, monkeypatch):
    opened = []
    monkeypatch.setattr("xattn.data.readers.listed_seconds", lambda path: opened.append(path.name) or 0.6)
    rows = [ROWS[0] | {"id": str(n)} for n in range(3)] + [ROWS[1]]
    assert [u.duration for u in utterances_from_table(write_table(folder / "t.csv", rows))] == [0.6] * 4
    assert opened == ["a.flac", "c.m4a"]  # rows can share a recording
    opened.clear()
    stated = [row | {"duration": duration} for row, duration in zip(rows, (0.6, 0.61, 0.62, 0.7), strict=True)]
    utterances = utterances_from_table(write_table(folder / "t.csv", stated))
    assert [u.duration for u in utterances] == [0.6, 0.61, 0.62, 0.7] and opened == ["a.flac"]
    milliseconds = [row | {"duration": 600} for row in rows]
    message = r"t\.csv row 2 \(id 0\): .*a\.flac lasts 0\.600 s, but the column duration says 600 s: correct the col"
    with pytest.raises(ValueError, match=message):
        utterances_from_table(write_table(folder / "t.csv", milliseconds))
    stated[2]["audio"] = "z.wav"
    with pytest.raises(FileNotFoundError, match=r"t\.csv row 4 \(id 2\): There is no audio file .*z\.wav"):
        utterances_from_table(write_table(folder / "t.csv", stated))


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "z.wav"}, r"row {} \(id 1\): There is no audio file .*z\.wav: check the path"),
        ({"language": ""}, r"row {} \(id 1\) has an empty language: fill it in or drop the row"),
        ({"id": "../1"}, r"row {}: The utterance id '\.\./1' cannot be part of a file name"),
        ({"id": "x é"}, r"row {} \(id x é\) repeats the id of row {}: rename one"),
        ({"id": "X e\u0301"}, r"row {} \(id x é\) repeats the id of row {}: rename one"),
    ],
)
def test_error_names_the_row_of_a_table(folder, name, change, message):
    table = write_table(folder / name, [ROWS[0] | change, ROWS[1]])
    first = 2 if name == "table.csv" else 1  # the header is row 1 of a spreadsheet
    rows = (first + 1, first) if "repeats" in message else (first,)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name} {message.format(*rows)}"):
        utterances_from_table(table)


def test_error_names_the_table(folder, missing):
    with pytest.raises(FileNotFoundError, match=r"There is no .*absent\.csv: give a CSV or Parquet file"):
        utterances_from_table(folder / "absent.csv")
    message = (
        r"table\.csv has no column language: add it to the header \(cells are separated by commas, semicolons or tab"
    )
    with pytest.raises(ValueError, match=message):
        utterances_from_table(write_table(folder / "table.csv", [{"id": "1", "audio": "a.flac"}]))
    with pytest.raises(ValueError, match=r"t\.parquet has more than one column transcript: rename or drop all but one"):
        utterances_from_table(write_table(folder / "t.parquet", [ROWS[0] | {"Transcript": "x"}]))
    with pytest.raises(ValueError, match=r"table\.csv has no rows"):
        utterances_from_table(write_table(folder / "table.csv", pd.DataFrame(ROWS)[:0]))
    encoded = [{"id": "1", "language": "en", "audio": {"bytes": b"RIFF", "path": None}}]
    with pytest.raises(ValueError, match=r"t\.parquet has no column audio: add it, as texts or numbers"):
        utterances_from_table(write_table(folder / "t.parquet", encoded))
    (folder / "t.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"t\.parquet is not a readable Parquet file: write it again"):
        utterances_from_table(folder / "t.parquet")
    missing("pyarrow")
    with pytest.raises(
        ImportError, match=r"t\.parquet needs pyarrow: install it with `pip install 'xattn\[datasets\]'`"
    ):
        utterances_from_table(folder / "t.parquet")


def encoded(samples, rate=SAMPLE_RATE, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


@pytest.fixture
def dataset(folder):
    """Two rows with embedded audio of different formats and rates, and one with a path."""
    audio = [
        {"bytes": encoded(noise(0.5, 8000), 8000), "path": "a.wav"},
        {"bytes": (folder / "c.m4a").read_bytes(), "path": None},
        {"bytes": None, "path": str(folder / "b talk.wav")},
    ]
    columns = {
        "audio": audio,
        "text": ["one", "two, three", "four"],
        "italian": ["uno", "due", "tre"],
        "key": [3, 1, 2],
    }
    return Dataset.from_dict(columns, split="validation").cast_column("audio", Audio(sampling_rate=16_000))


def test_dataset_is_written_as_a_corpus(dataset, folder, tmp_path):
    columns = {"translation": "italian", "target_language": "it", "id": "key"}
    utterances = utterances_from_dataset(dataset, tmp_path / "corpus", "en", **columns)
    assert [(u.id, u.transcript, u.translation) for u in utterances] == [
        ("3", "one", "uno"),
        ("1", "two, three", "due"),
        ("2", "four", "tre"),
    ]
    assert {(u.language, u.target_language, u.split) for u in utterances} == {("en", "it", "validation")}
    assert utterances == load_corpus(tmp_path / "corpus", language="en", split="validation")
    (folder / "source.wav").write_bytes(encoded(noise(0.5, 8000), 8000))
    for utterance, source in zip(utterances, ("source.wav", "c.m4a", "b talk.wav"), strict=True):
        half_a_step = 0.51 / 2**15  # of 16-bit samples
        np.testing.assert_allclose(utterance.audio(), load_audio(folder / source), atol=half_a_step)


def test_dataset_on_disk_with_other_column_names(folder, tmp_path):
    dataset = Dataset.from_dict({"file": [str(folder / "a.flac")] * 2, "sentence": ["one", "two"]})
    dataset.save_to_disk(tmp_path / "saved")
    names = {"audio": "file", "transcript": "sentence"}
    for source in (dataset, tmp_path / "saved", str(tmp_path / "saved")):
        utterances = utterances_from_dataset(source, tmp_path / "corpus", "en", **names)
        assert [(u.id, u.transcript) for u in utterances] == [("000000", "one"), ("000001", "two")]
        assert {(u.translation, u.target_language, u.split) for u in utterances} == {("", "", "")}


def test_dataset_is_decoded_once(dataset, tmp_path, monkeypatch):
    first = utterances_from_dataset(dataset, tmp_path / "corpus", "en")
    first[1].audio_path.unlink()
    calls = []
    monkeypatch.setattr("xattn.data.readers.load_audio", lambda path: calls.append(path) or load_audio(path))
    assert utterances_from_dataset(dataset, tmp_path / "corpus", "en") == first
    assert len(calls) == 1
    # Two ids now have other recordings.
    utterances_from_dataset(dataset.select([1, 0, 2]), tmp_path / "corpus", "en")
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio": "sound"}, r"no column 'sound': set audio to one of audio, text, italian, key\."),
        ({"transcript": "words"}, r"no column 'words': set transcript to one of audio, text, italian, key\."),
        ({"id": "name"}, r"no column 'name': set id to one of audio, text, italian, key\."),
        ({"audio": "key"}, r"The column 'key' holds no recordings: set audio to the one that does"),
        ({"translation": "italian"}, r"give both translation and target_language, or neither"),
        ({"target_language": "it"}, r"give both translation and target_language, or neither"),
    ],
)
def test_error_names_the_column(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        utterances_from_dataset(dataset, tmp_path / "corpus", "en", **options)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", None, r"Row 1 of the dataset has an empty text: filter such rows out first"),
        ("text", "  ", r"Row 1 of the dataset has an empty text: filter such rows out first"),
        ("key", "a/b", r"Row 1 of the dataset: The utterance id 'a/b' cannot be part of a file name"),
        (
            "key",
            "3",
            r"Row 1 of the dataset repeats the id 3, compared without case .*: set id to another column, or le",
        ),
        ("audio", None, r"Row 1 of the dataset has no audio, and there is no file at its path None: put"),
        ("audio", {"bytes": None, "path": "absent.wav"}, r"Row 1 of the dataset has no audio, .* path 'absent\.wav'"),
        ("audio", {"bytes": b"no", "path": "b.wav"}, r"Row 1 of the dataset: its audio cannot be read as audio: conv"),
    ],
)
def test_error_names_the_row_of_a_dataset(dataset, tmp_path, column, value, message):
    columns = dataset.cast_column("audio", Audio(decode=False)).to_dict()
    columns["key"] = [str(key) for key in columns["key"]]
    columns[column][1] = value
    changed = Dataset.from_dict(columns)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        utterances_from_dataset(changed, tmp_path / "corpus", "en", id="key")
    assert not (tmp_path / "corpus/manifest.csv").exists()


def test_error_says_why_a_dataset_cannot_be_used(dataset, tmp_path, corpus_folder, missing):
    with pytest.raises(ValueError, match=r"A DatasetDict is not a datasets\.Dataset: choose one split"):
        utterances_from_dataset(DatasetDict({"test": dataset}), tmp_path / "corpus", "en")
    with pytest.raises(ValueError, match=r"A IterableDataset is not a datasets\.Dataset: choose one split"):
        utterances_from_dataset(dataset.to_iterable_dataset(), tmp_path / "corpus", "en")
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder written by save_to_disk: check the path"):
        utterances_from_dataset(tmp_path / "absent", tmp_path / "corpus", "en")
    with pytest.raises(ValueError, match="The dataset has no rows: choose another split"):
        utterances_from_dataset(dataset.select([]), tmp_path / "corpus", "en")
    shutil.copytree(corpus_folder, tmp_path / "taken")
    with pytest.raises(
        ValueError, match="taken holds files that were not made from a dataset: choose a folder of its own"
    ):
        utterances_from_dataset(dataset, tmp_path / "taken", "en")
    assert (tmp_path / "taken/manifest.csv").read_bytes() == (corpus_folder / "manifest.csv").read_bytes()
    missing("datasets")
    with pytest.raises(ImportError, match=r"This needs datasets: install it with `pip install 'xattn\[datasets\]'`"):
        utterances_from_dataset(dataset, tmp_path / "corpus", "en")


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_recording(path, seconds=0.5, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds), SAMPLE_RATE, **options)


@pytest.fixture
def librispeech(tmp_path):
    """Two splits in the layout of LibriSpeech."""
    root = tmp_path / "LibriSpeech"
    for split, chapter, texts in (
        ("dev-clean", "84-121123", ["GO DO YOU HEAR", "BUT IN LESS THAN FIVE MINUTES"]),
        ("test-clean", "61-70968", ["HE BEGAN A CONFUSED COMPLAINT"]),
    ):
        folder = root / split / chapter.replace("-", "/")
        for number, _ in enumerate(texts):
            write_recording(folder / f"{chapter}-{number:04}.flac", 0.5 + number / 10)
        write_text(folder / f"{chapter}.trans.txt", *(f"{chapter}-{n:04} {text}" for n, text in enumerate(texts)))
    write_text(root / "SPEAKERS.TXT", "61 | M | test-clean | 8.08 | Paul-Gabriel Wiener")
    return root


def test_librispeech(librispeech, capsys):
    utterances = load_corpus(librispeech)
    assert capsys.readouterr().out == (
        f"{librispeech} is read as LibriSpeech: 3 utterances; en; dev-clean, test-clean.\n"
    )
    assert [(u.id, u.language, u.split, u.transcript, u.duration) for u in utterances] == [
        ("84-121123-0000", "en", "dev-clean", "GO DO YOU HEAR", 0.5),
        ("84-121123-0001", "en", "dev-clean", "BUT IN LESS THAN FIVE MINUTES", 0.6),
        ("61-70968-0000", "en", "test-clean", "HE BEGAN A CONFUSED COMPLAINT", 0.5),
    ]
    assert utterances[1].audio().size == 0.6 * SAMPLE_RATE
    test = utterances[2:]
    assert load_corpus(librispeech, split="test-clean", language="en") == test
    assert load_corpus(librispeech.parent, split="test-clean") == test
    assert load_corpus(librispeech / "test-clean") == test
    assert load_corpus(librispeech / "test-clean" / "61") == test
    assert load_corpus(test[0].audio_path.parent, split="test-clean") == test


def test_the_layout_of_librispeech_in_another_language(librispeech):
    assert {u.language for u in utterances_from_librispeech(librispeech, language="it")} == {"it"}
    with pytest.raises(ValueError, match=r"LibriSpeech has no utterance of language 'it': choose among en\."):
        load_corpus(librispeech, language="it")


def test_faults_of_librispeech(librispeech, tmp_path):
    with pytest.raises(ValueError, match=r"no utterance of split 'test': choose among en dev-clean, en test-clean\."):
        load_corpus(librispeech, split="test")
    chapter = librispeech / "test-clean/61/70968"
    table, recording = chapter / "61-70968.trans.txt", chapter / "61-70968-0000.flac"
    recording.rename(tmp_path / "moved.flac")
    message = r"\.trans\.txt line 1 names the recording .*61-70968-0000\.flac, which is missing or named twice: unpack"
    with pytest.raises(FileNotFoundError, match=message):
        load_corpus(librispeech)
    assert len(load_corpus(librispeech, split="dev-clean")) == 2
    (tmp_path / "moved.flac").rename(recording)
    write_text(table, "61-70968-0000")
    with pytest.raises(
        ValueError, match=r"trans\.txt line 1 is '61-70968-0000', but an id and a transcript are needed"
    ):
        load_corpus(librispeech)
    table.write_bytes(b"61-70968-0000 \xc9")
    with pytest.raises(ValueError, match=r"61-70968\.trans\.txt is not encoded in UTF-8: save it again"):
        load_corpus(librispeech)
    table.unlink()
    with pytest.raises(
        ValueError, match=r"61-70968-0000\.flac has no transcript in a \*\.trans\.txt beside it: unpack"
    ):
        load_corpus(librispeech)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is no \*\.trans\.txt in .*: give the folder of LibriSpeech"):
        utterances_from_librispeech(tmp_path / "empty")


COLUMNS = ("client_id", "path", "sentence", "up_votes", "locale")


def write_list(place, split, *rows):
    write_text(place / f"{split}.tsv", "\t".join(COLUMNS), *("\t".join(row) for row in rows))


@pytest.fixture
def common_voice(tmp_path):
    """A release with two languages in the layout of Common Voice."""
    root, number = tmp_path / "cv-corpus-22.0", 0
    for locale, split, sentences in (
        ("it", "train", ["il cane", '"Sì", disse, "no"']),
        ("it", "test", ['"Dove?']),
        ("sv-SE", "test", ["hunden"]),
    ):
        rows = []
        for sentence in sentences:
            number += 1
            name = f"common_voice_{locale}_{number}.mp3"
            write_recording(root / locale / "clips" / name, 0.5 + number / 10)
            rows.append(("0af1", name, sentence, "2", locale))
        write_list(root / locale, split, *rows)
    write_list(root / "it", "validated", ("0af1", "common_voice_it_1.mp3", "il cane", "2", "it"))
    write_text(root / "it/reported.tsv", "sentence_id\tsentence\treason")
    return root


def test_common_voice(common_voice, capsys):
    utterances = load_corpus(common_voice / "it")
    assert capsys.readouterr().out == f"{common_voice / 'it'} is read as Common Voice: 3 utterances; it; test, train.\n"
    assert [(u.id, u.language, u.split, u.transcript) for u in utterances] == [
        ("common_voice_it_1", "it", "train", "il cane"),
        ("common_voice_it_2", "it", "train", '"Sì", disse, "no"'),
        ("common_voice_it_3", "it", "test", '"Dove?'),
    ]
    assert utterances[0].audio().size / SAMPLE_RATE == pytest.approx(0.6, abs=0.08)  # MP3 pads its frames
    assert load_corpus(common_voice, language="it", split="test") == utterances[2:]
    assert load_corpus(common_voice / "it" / "test.tsv") == utterances[2:]
    assert load_corpus(common_voice / "it", split="validated")[0].id == "common_voice_it_1"
    assert len(load_corpus(common_voice)) == 4
    for language in ("sv", "sv-SE"):
        assert [(u.language, u.transcript) for u in load_corpus(common_voice, language=language)] == [("sv", "hunden")]


def test_a_release_of_common_voice_without_official_splits(common_voice):
    for split in ("train", "test"):
        (common_voice / "it" / f"{split}.tsv").unlink()
    assert [(u.id, u.split) for u in load_corpus(common_voice / "it")] == [("common_voice_it_1", "validated")]


def test_lengths_of_clips_come_from_the_list_of_durations(common_voice, monkeypatch):
    rows = [f"common_voice_it_{n}.mp3\t{500 + 100 * n}" for n in (1, 2, 9)]
    write_text(common_voice / "it/clip_durations.tsv", "clip\tduration[ms]", *rows)
    opened = []
    monkeypatch.setattr("xattn.data.layouts.listed_seconds", lambda path: opened.append(path.stem) or 9.0)
    assert [u.duration for u in utterances_from_common_voice(common_voice / "it")] == [0.6, 0.7, 9.0]
    assert opened == ["common_voice_it_3"]


def test_first_releases_of_common_voice(tmp_path):
    write_recording(tmp_path / "it/clips/3f2a.mp3")
    write_text(tmp_path / "it/test.tsv", "path\tsentence", "3f2a\til cane")
    (utterance,) = load_corpus(tmp_path / "it")
    assert (utterance.id, utterance.language, utterance.transcript) == ("3f2a", "it", "il cane")


def test_faults_of_common_voice(common_voice):
    italian = common_voice / "it"
    with pytest.raises(
        FileNotFoundError, match=r"There is no .*dev\.tsv: choose a split among reported, test, train, v"
    ):
        load_corpus(italian, split="dev")
    with pytest.raises(ValueError, match=r"it has no utterance of language 'de': choose among it test, it train\."):
        load_corpus(italian, language="de")
    with pytest.raises(ValueError, match=r"22\.0 has no utterance of language 'de': choose among it, sv-SE\."):
        load_corpus(common_voice, language="de")
    with pytest.raises(ValueError, match=r"test\.tsv is the split 'test': leave out split, or give the folder"):
        load_corpus(italian / "test.tsv", split="train")
    write_list(italian, "test", ("0af1", "common_voice_it_8.mp3", "x", "2", "it"))
    message = r"test\.tsv row 2 names the clip .*clips.common_voice_it_8\.mp3, which is missing: unpack"
    with pytest.raises(FileNotFoundError, match=message):
        load_corpus(italian, split="test")
    write_list(italian, "test", ("0af1", "common_voice_it_1.mp3", "il\tcane", "2", "it"))
    with pytest.raises(ValueError, match=r"test\.tsv row 2 has 6 cells, but the header has 5: "):
        load_corpus(italian, split="test")
    with pytest.raises(
        FileNotFoundError, match=r"There is no folder clips in .*: give the folder of a language of Com"
    ):
        utterances_from_common_voice(italian / "clips")


TIMIT = {
    "TXT": ["0 8000 She had."],
    "WRD": ["800 3200 she", "3000 6400 had"],  # words that share a phone overlap
    "PHN": ["0 800 h#", "800 2000 sh", "2000 3200 iy", "3000 6400 hv", "6400 8000 h#"],
}


@pytest.fixture(params=[str.upper, str.lower], ids=["upper", "lower"])
def timit(tmp_path, request):
    """Two speakers in the layout of TIMIT, with NIST SPHERE recordings."""
    root, case = tmp_path / "corpora", request.param
    for speaker in ("TRAIN/DR1/FCJF0", "TEST/DR2/MABW0"):
        for kind, lines in TIMIT.items():
            write_text(root / case(f"TIMIT/{speaker}/SA1.{kind}"), *lines)
        recording = root / case(f"TIMIT/{speaker}/SA1.WAV")
        write_recording(recording, format="NIST", subtype="PCM_16")
        assert recording.read_bytes().startswith(b"NIST_1A")
    write_text(root / case("TIMIT/DOC/PROMPTS.TXT"), "She had your dark suit.")
    return root / case("TIMIT")


def file_of(folder, name):
    """The first file of this name, whatever its case."""
    return next(path for path in sorted(folder.rglob("*")) if path.name.upper() == name)


def test_timit(timit, capsys):
    utterances = load_corpus(timit)
    assert capsys.readouterr().out == f"{timit} is read as TIMIT: 2 utterances; en; test, train.\n"
    assert {(u.id.upper(), u.split) for u in utterances} == {("MABW0_SA1", "test"), ("FCJF0_SA1", "train")}
    for utterance in utterances:
        assert (utterance.language, utterance.transcript, utterance.duration) == ("en", "She had.", 0.5)
        assert utterance.words == (Word("she", 0.05, 0.2), Word("had", 0.1875, 0.4))
        assert utterance.phones[1:3] == (Word("sh", 0.05, 0.125), Word("iy", 0.125, 0.2))
        np.testing.assert_allclose(utterance.audio(), noise(0.5), atol=2**-15)
    (test,) = load_corpus(timit, split="test", language="en")
    assert test.split == "test" and load_corpus(timit, split="TEST") == [test]
    for folder in (test.audio_path.parent, test.audio_path.parents[1], test.audio_path.parents[2]):
        assert load_corpus(folder) == [test]
    # Some copies hold converted recordings too.
    shutil.copy(test.audio_path, test.audio_path.with_name(f"{test.audio_path.name}.wav"))
    assert load_corpus(timit, split="test") == [test]


def test_timit_without_splits_and_sample_numbers(tmp_path):
    write_recording(tmp_path / "timit/dr1-fvmh0/sa1.wav")
    for kind, lines in {**TIMIT, "TXT": ["She had."]}.items():
        write_text(tmp_path / f"timit/dr1-fvmh0/sa1.{kind.lower()}", *lines)
    (utterance,) = load_corpus(tmp_path)
    assert (utterance.id, utterance.split, utterance.transcript) == ("dr1-fvmh0_sa1", "", "She had.")
    with pytest.raises(ValueError, match=r"has no utterance of split 'test': choose among en\."):
        load_corpus(tmp_path, split="test")


@pytest.mark.parametrize("suffix", [".WAV", ".TXT", ".WRD", ".PHN"])
def test_a_missing_file_of_timit(timit, suffix):
    file_of(file_of(timit, "FCJF0"), f"SA1{suffix}").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"(?i)FCJF0.SA1\.\w+ has no {suffix} beside it: unpack the archive ag"
    ):
        load_corpus(timit)
    assert len(load_corpus(timit, split="test")) == 1


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("WRD", "800 she", "is '800 she', but a start and an end in samples and a word are needed: unpack"),
        ("WRD", "0.05 0.2 she", "is '0.05 0.2 she', but a start and an end in samples and a word are needed: unpack"),
        ("PHN", "3200 800 sh", r"is '3200 800 sh', but lines must be in order and end within the 0\.500 s of the reco"),
        (
            "PHN",
            "0 9000 sh",
            r"is '0 9000 sh', but lines must be in order and end within the 0\.500 s of the recording",
        ),
    ],
)
def test_a_wrong_line_of_timit(timit, kind, line, message):
    write_text(file_of(timit, f"SA1.{kind}"), line)
    with pytest.raises(ValueError, match=rf"(?i)SA1\.{kind} line 1 {message}"):
        load_corpus(timit)


def test_faults_of_timit(timit, tmp_path):
    file_of(timit, "SA1.TXT").write_text("0 8000 ")
    with pytest.raises(ValueError, match=r"(?i)SA1\.TXT is empty: unpack the archive again"):
        load_corpus(timit)
    with pytest.raises(ValueError, match=r"(?i)TIMIT has no utterance of language 'it': choose among en\."):
        load_corpus(timit, language="it")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is no sentence of TIMIT in .*empty: give the folder of TIMIT"):
        utterances_from_timit(tmp_path / "empty")


def test_two_copies_of_a_corpus(timit):
    speaker = file_of(timit, "FCJF0")
    shutil.copytree(speaker, timit / "copy" / speaker.name.swapcase())
    with pytest.raises(ValueError, match=r"(?i)The ids 'fcjf0_sa1' of .* and 'fcjf0_sa1' of .* are equal without case"):
        load_corpus(timit)


def test_a_folder_of_recordings_is_a_corpus(folder, capsys):
    assert load_corpus(folder, language="en") == utterances_from_folder(folder, "en")
    assert capsys.readouterr().out == (
        f"{folder} is read as a folder of recordings: 3 utterances; en; 1 without transcript.\n"
    )
    with pytest.raises(ValueError, match=r"recordings holds recordings in an unknown language: give it, such as lang"):
        load_corpus(folder)
    (older,) = load_corpus(folder, language="en", split="older")
    assert (older.id, older.split) == ("d", "older")
    with pytest.raises(
        ValueError, match=r"recordings has no sub-folder 'test' with recordings: choose a split among old"
    ):
        load_corpus(folder, language="en", split="test")
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.unlink()
    assert load_corpus(folder, language="en", split="older") == [older]
    with pytest.raises(ValueError, match=r"has recordings only in sub-folders: choose a split among older\."):
        load_corpus(folder, language="en")


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_is_a_corpus(folder, name, capsys):
    table = write_table(folder / name, ROWS)
    assert load_corpus(table, language="it", split="test") == utterances_from_table(table)[1:]
    assert capsys.readouterr().out == f"{table} is read as a table: 1 utterance; it-en; test; 1 without transcript.\n"


def test_a_manifest_is_a_corpus(corpus_folder, capsys):
    for path in (corpus_folder, corpus_folder / "manifest.csv"):
        assert len(load_corpus(path, split="dev")) == 3
        assert capsys.readouterr().out == (
            f"{path} is read as a corpus with manifest.csv: 3 utterances; en-it, it-en; dev.\n"
        )


def test_a_layout_that_is_not_known(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"There is no .*absent: give the folder or the table of a corpus"):
        load_corpus(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"empty has no layout that is known: give a table, or a folder with a "
    ):
        load_corpus(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"a\.flac is one recording: give its folder, or use xattn\.utterance_from_file"
    ):
        load_corpus(folder / "a.flac")
    (tmp_path / "test-clean.tar.gz").touch()
    with pytest.raises(ValueError, match=r"test-clean\.tar\.gz is an archive: unpack it and give the folder"):
        load_corpus(tmp_path / "test-clean.tar.gz")


@real_speech
def test_real_librispeech(capsys):
    utterances = load_corpus(SPEECH / "librispeech", split="test-other")
    assert capsys.readouterr().out.endswith(" is read as LibriSpeech: 60 utterances; en; test-other.\n")
    assert len({u.id.split("-")[0] for u in utterances}) == 6
    assert all(u.transcript == u.transcript.upper() and u.id in u.audio_path.name for u in utterances)
    assert all(u.audio().size == round(u.duration * SAMPLE_RATE) for u in utterances)


@real_speech
def test_real_timit(capsys):
    utterances = load_corpus(SPEECH / "timit")
    assert capsys.readouterr().out.endswith(" is read as TIMIT: 90 utterances; en.\n")
    first = utterances[0]
    assert (first.id, first.transcript) == ("dr1-fvmh0_sa1", "She had your dark suit in greasy wash water all year.")
    assert first.words[0] == Word("she", 7812 / SAMPLE_RATE, 10_610 / SAMPLE_RATE) and len(first.words) == 11
    assert first.phones[1] == Word("sh", 7812 / SAMPLE_RATE, 9507 / SAMPLE_RATE) and len(first.phones) == 37
    assert all(u.words and u.phones and u.audio().size == round(u.duration * SAMPLE_RATE) for u in utterances)


@real_speech
def test_real_recordings_of_common_voice_and_europarl():
    italian = load_corpus(SPEECH / "common_voice_it", language="it")
    assert [u.id for u in italian] == [f"common_voice_it_{n}" for n in (20020291, 20047586, 20088717)]
    assert len(load_corpus(SPEECH / "europarl_st_en", language="en")) == 8
    message = (
        r"lst line 1 names the speech .*en\.20080924\.31\.3-243\.m4a, which is missing; unpack the archive again\."
    )
    with pytest.raises(ValueError, match=message):
        load_corpus(SPEECH / "europarl_st_layout")
