"""Reading recordings from a folder, a table and a Hugging Face dataset, without a network."""

import builtins
import io
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import encode
from datasets import Audio, Dataset, DatasetDict

import xattn
from xattn import load_corpus, utterances_from_dataset, utterances_from_folder, utterances_from_table
from xattn.audio import SAMPLE_RATE, load_audio


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


def test_utterances_from_a_folder_can_be_explained(folder, model):
    for utterance in utterances_from_folder(folder, "en")[:2]:
        maps = xattn.explain(model, utterance, occlusion=xattn.Occlusion(4, 4), progress=False)
        assert (maps.utterance, maps.reference) == (utterance.id, utterance.transcript)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.pdf", b"%PDF", r"notes\.pdf cannot be read as audio: convert it"),
        ("readme.txt", b"hello", r"readme\.txt has no recording of its name beside it: rename it, or put it elsewhere"),
        ("a.txt", b"\xe9", r"a\.txt is not encoded in UTF-8: save it again"),
        ("a.mp3", b"", r"a\.mp3 has the name of a\.flac: rename one"),
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


def test_folder_without_recordings_is_an_error(tmp_path):
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
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "z.wav"}, r"row {} \(id 1\): There is no audio file .*z\.wav: check the path"),
        ({"audio": "a.txt"}, r"row {} \(id 1\): .*a\.txt cannot be read as audio"),
        ({"language": ""}, r"row {} \(id 1\) has an empty language: fill it in or drop the row"),
        ({"id": "../1"}, r"row {}: The utterance id '\.\./1' cannot be part of a file name"),
        ({"id": "x é"}, r"row {} \(id x é\) repeats the id of row {}: rename one"),
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
    with pytest.raises(ValueError, match=r"table\.csv has no column language: add it to the header"):
        utterances_from_table(write_table(folder / "table.csv", [{"id": "1", "audio": "a.flac"}]))
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
        ("key", "3", r"Row 1 of the dataset repeats the id 3: set id to another column, or leave it out"),
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
