import csv
import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from xattn.audio import SAMPLE_RATE
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance, Word, utterance_from_file, utterance_from_recording
from xattn.store import load, path_of, save

MANIFEST = tuple(
    csv.reader(
        [
            "id,split,language,audio,duration,transcript,translation,voice,rate,pitch,noise,snr,sha256",
            "en1,test,en,audio/en1.flac,0.8,the dog sleeps,il cane dorme,en+m3,160,50,white,12.5,",
            'en2,dev,en,audio/en2.flac,0.8,"yes, it is","sì, lo è",en+f2,150,40,,,',
            "it1,test,it,audio/it1.flac,0.8,il gatto,the cat,it,160,50,white,8,",
        ]
    )
)
WORDS = (
    ["id", "word", "start", "end"],
    ["en1", "the", "0.05", "0.2"],
    ["en1", "dog", "0.2", "0.5"],
    ["en1", "sleeps", "0.5", "0.8"],
    ["it1", "il", "0.1", "0.3"],
    ["it1", "gatto", "0.35", "0.7"],
)


class Folder:
    """A corpus of three utterances that a test can damage before it is read."""

    def __init__(self, path):
        self.path = path
        self.manifest = [list(row) for row in MANIFEST]
        self.words = [list(row) for row in WORDS]
        self.samples = {}
        (path / "audio").mkdir()
        for seed, row in enumerate(self.manifest[1:]):
            samples = np.random.default_rng(seed).integers(-9000, 9000, round(0.8 * SAMPLE_RATE)).astype(np.int16)
            soundfile.write(path / row[3], samples, SAMPLE_RATE)
            row[-1] = hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
            self.samples[row[0]] = samples
        self.write()

    def write(self, encoding="utf-8"):
        for name, rows in (("manifest.csv", self.manifest), ("words.csv", self.words)):
            with open(self.path / name, "w", newline="", encoding=encoding) as file:
                csv.writer(file).writerows(rows)

    def set(self, row, column, value):
        """Change a cell of the manifest; rows are counted as in a spreadsheet."""
        self.manifest[row - 1][MANIFEST[0].index(column)] = value
        self.write()


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_every_field_is_read(folder):
    corpus = load_corpus(folder.path)
    assert [utterance.id for utterance in corpus] == ["en1", "en2", "it1"]
    first, second, third = corpus
    assert (first.language, first.split, first.duration, first.voice, first.snr) == ("en", "test", 0.8, "en+m3", 12.5)
    assert first.audio_path == folder.path / "audio/en1.flac"
    assert first.words == (Word("the", 0.05, 0.2), Word("dog", 0.2, 0.5), Word("sleeps", 0.5, 0.8))
    assert (second.transcript, second.translation) == ("yes, it is", "sì, lo è")
    assert (second.snr, second.words) == (None, ())
    assert [utterance.target_language for utterance in corpus] == ["it", "it", "en"]
    assert third.row == 4
    for utterance in corpus:
        np.testing.assert_array_equal(utterance.audio(), folder.samples[utterance.id] / 2**15)
    assert pickle.loads(pickle.dumps(corpus)) == corpus


@pytest.mark.parametrize(
    ("language", "split", "ids"),
    [("en", None, ["en1", "en2"]), (None, "test", ["en1", "it1"]), ("en", "dev", ["en2"]), (None, None, None)],
)
def test_language_and_split_filter_the_corpus(folder, language, split, ids):
    found = [utterance.id for utterance in load_corpus(folder.path, language=language, split=split)]
    assert found == (ids or ["en1", "en2", "it1"])


@pytest.mark.parametrize(
    ("language", "split", "wanted"),
    [("de", None, "language 'de'"), (None, "train", "split 'train'"), ("it", "dev", "language 'it' split 'dev'")],
)
def test_an_empty_selection_raises(folder, language, split, wanted):
    message = f"manifest.csv has no utterance of {wanted}: choose among en dev, en test, it test."
    with pytest.raises(ValueError, match=message):
        load_corpus(folder.path, language=language, split=split)


def test_a_manifest_without_rows_raises(folder):
    folder.manifest = folder.manifest[:1]
    folder.write()
    with pytest.raises(ValueError, match=r"manifest\.csv has no utterance: choose among none\."):
        load_corpus(folder.path)


def test_few_columns_and_a_byte_order_mark_are_enough(folder):
    folder.manifest = [["transcript", "id", "audio", "language"], ["the dog", "a", "audio/en1.flac", "en"]]
    folder.write(encoding="utf-8-sig")
    (folder.path / "words.csv").unlink()
    (utterance,) = load_corpus(folder.path)
    assert (utterance.id, utterance.transcript, utterance.translation, utterance.split) == ("a", "the dog", "", "")
    assert utterance.duration == 0.8  # from the audio
    np.testing.assert_array_equal(utterance.audio(), folder.samples["en1"] / 2**15)


def test_references_are_transcripts_and_translations(folder):
    english, _, italian = load_corpus(folder.path)
    assert [italian.text(direction) for direction in ("it", "it-en")] == ["il gatto", "the cat"]
    assert english.reference("en") == "the dog sleeps"
    assert english.reference("en-it") == "il cane dorme"
    assert italian.reference("it") == "il gatto"
    assert italian.reference("it-en") == "the cat"


@pytest.mark.parametrize("direction", ["it", "it-en", "e", "", "-it"])
def test_a_reference_for_another_language_raises(folder, direction):
    utterance = load_corpus(folder.path)[0]
    message = f"Utterance en1 is spoken in 'en' and has no reference for the direction '{direction}': choose"
    for text in (utterance.reference, utterance.text):
        with pytest.raises(ValueError, match=message):
            text(direction)


def test_a_reference_for_another_target_raises(folder):
    utterance = load_corpus(folder.path)[0]
    for text in (utterance.reference, utterance.text):
        with pytest.raises(ValueError, match="en1 is translated into 'it' .* 'en-de': use the direction 'en-it'"):
            text("en-de")
    unknown = replace(utterance, target_language="")  # a translation into a language that the corpus does not name
    assert unknown.text("en-de") == unknown.text("en-it") == "il cane dorme"


def test_a_missing_reference_raises(folder):
    folder.set(2, "translation", "")
    assert load_corpus(folder.path)[0].text("en-it") == ""
    with pytest.raises(ValueError, match="Utterance en1 has no translation, which the direction 'en-it' needs: add it"):
        load_corpus(folder.path)[0].reference("en-it")
    own = utterance_from_file(folder.path / "audio/en1.flac", "en")
    assert own.text("en") == own.text("en-it") == ""
    with pytest.raises(ValueError, match="Utterance en1 has no transcript, which the direction 'en' needs: add it"):
        own.reference("en")


def test_a_missing_manifest_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*manifest\.csv: give the folder of a corpus"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("column", ["id", "audio", "language", "transcript"])
def test_a_missing_column_raises(folder, column):
    folder.set(1, column, "other")
    with pytest.raises(ValueError, match=rf"manifest\.csv has no column {column}: add it to the header"):
        load_corpus(folder.path)


@pytest.mark.parametrize("column", ["id", "audio", "language", "transcript"])
def test_an_empty_cell_raises(folder, column):
    folder.set(3, column, " ")
    id = "" if column == "id" else "en2"
    with pytest.raises(ValueError, match=rf"manifest\.csv row 3 \(id \s*{id}\) has an empty {column}: fill it in"):
        load_corpus(folder.path)


def test_a_repeated_id_raises(folder):
    folder.set(4, "id", "en1")
    with pytest.raises(ValueError, match=r"manifest\.csv row 4 \(id en1\) repeats the id of row 2: rename one"):
        load_corpus(folder.path)


@pytest.mark.parametrize("line", ["en1,en,audio/en1.flac,yes, it is", "en1,en,audio/en1.flac"])
def test_a_wrong_number_of_cells_raises(folder, line):
    (folder.path / "manifest.csv").write_text(f"id,language,audio,transcript\n{line}\n")
    with pytest.raises(ValueError, match=r"row 2 \(id en1\) does not have as many cells as the header: quote texts"):
        load_corpus(folder.path)


def test_another_encoding_raises(folder):
    folder.write(encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.csv is not encoded in UTF-8: save it again"):
        load_corpus(folder.path)


def test_a_quote_that_is_not_closed_raises(folder):
    rows = "".join(f"en{number},en,audio/en1.flac,yes it is\n" for number in range(9999))
    (folder.path / "manifest.csv").write_text(f'id,language,audio,transcript\na,en,audio/en1.flac,"yes\n{rows}')
    with pytest.raises(ValueError, match=r"manifest\.csv cannot be read as CSV \(field larger .*\): look for a quote"):
        load_corpus(folder.path)


@pytest.mark.parametrize(
    ("column", "value"), [("duration", "long"), ("snr", "nan"), ("duration", "inf"), ("duration", "0,8")]
)
def test_a_cell_that_is_not_a_number_raises(folder, column, value):
    folder.set(3, column, value)
    with pytest.raises(
        ValueError, match=rf"row 3 \(id en2\) has '{value}' as its {column}, but a number is needed: correct"
    ):
        load_corpus(folder.path)


def test_missing_audio_raises(folder):
    (folder.path / "audio/it1.flac").unlink()
    with pytest.raises(FileNotFoundError, match=r"row 4 \(id it1\) names the audio .*it1\.flac, which is missing"):
        load_corpus(folder.path)
    assert len(load_corpus(folder.path, language="en")) == 2


def test_unreadable_audio_raises(folder):
    (folder.path / "audio/en1.flac").write_bytes(b"not audio")
    utterance = load_corpus(folder.path)[0]
    with pytest.raises(ValueError, match=r"row 2 \(id en1\): .*en1\.flac cannot be read: convert it to WAV or FLAC"):
        utterance.audio()


def test_a_wrong_rate_raises(folder):
    soundfile.write(folder.path / "audio/en1.flac", folder.samples["en1"][::2], SAMPLE_RATE // 2)
    utterance = load_corpus(folder.path)[0]
    with pytest.raises(
        ValueError, match=r"row 2 \(id en1\): .*en1\.flac is at 8000 Hz, but a corpus needs 16000 Hz: resample it"
    ):
        utterance.audio()


@pytest.mark.parametrize(("duration", "agrees"), [("0.84", True), ("0.76", True), ("0.86", False), ("0.74", False)])
def test_the_duration_has_to_agree_with_the_audio(folder, duration, agrees):
    folder.set(3, "duration", duration)
    utterance = load_corpus(folder.path)[1]
    if agrees:
        assert utterance.audio().size == round(0.8 * SAMPLE_RATE)
    else:
        message = rf"row 3 \(id en2\): .*en2\.flac lasts 0\.800 s, but the manifest says {duration}0 s: restore"
        with pytest.raises(ValueError, match=message):
            utterance.audio()


def test_other_audio_of_the_same_length_raises(folder):
    samples = folder.samples["en1"].copy()
    samples[-1] += 1
    soundfile.write(folder.path / "audio/en1.flac", samples, SAMPLE_RATE)
    utterance = load_corpus(folder.path)[0]
    with pytest.raises(ValueError, match=r"row 2 \(id en1\): .*is not the audio that the manifest describes"):
        utterance.audio()


@pytest.mark.parametrize(
    ("row", "start", "end", "message"),
    [
        (4, "0.4", "0.8", r"the word 'sleeps' from 0\.4 to 0\.8 s is out of order after 0\.5 s: list"),
        (4, "0.7", "0.6", r"the word 'sleeps' from 0\.7 to 0\.6 s is out of order after 0\.5 s: list"),
        (2, "-0.1", "0.1", r"the word 'the' from -0\.1 to 0\.1 s is out of order after 0 s: list"),
        (4, "0.5", "0.9", r"the word 'sleeps' ends at 0\.9 s, beyond the audio's 0\.800 s: correct"),
    ],
)
def test_wrong_word_times_raise(folder, row, start, end, message):
    folder.words[row - 1][2:] = start, end
    folder.write()
    with pytest.raises(ValueError, match=rf"words\.csv row {row} \(id en1\): {message}"):
        load_corpus(folder.path)


def test_a_file_of_any_rate_becomes_an_utterance(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (44_100, 2))
    soundfile.write(tmp_path / "my talk.wav", samples, 44_100)
    utterance = utterance_from_file(tmp_path / "my talk.wav", "en", "hello")
    assert (utterance.id, utterance.language, utterance.duration) == ("my talk", "en", 1.0)
    assert utterance.reference("en") == "hello"
    assert utterance.audio().shape == (SAMPLE_RATE,)
    with pytest.raises(FileNotFoundError, match="There is no audio file"):
        utterance_from_file(tmp_path / "absent.wav", "en")


def test_a_recording_in_memory_becomes_an_utterance(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (22_050, 2)).astype(np.float32)
    soundfile.write(tmp_path / "my talk.wav", samples, 44_100, subtype="FLOAT")
    utterance = utterance_from_recording(tmp_path / "my talk.wav")
    assert (utterance.id, utterance.language, utterance.duration) == ("my talk", "", 0.5)
    assert utterance.audio_path == tmp_path / "my talk.wav"
    memory = utterance_from_recording(samples, 44_100, "en")
    assert (memory.language, memory.duration, memory.audio_path) == ("en", 0.5, None)
    np.testing.assert_array_equal(memory.audio(), utterance.audio())
    assert memory.id == utterance_from_recording((44_100, samples)).id and memory.id.startswith("recording-")
    assert memory.id != utterance_from_recording(samples / 2, 44_100).id
    assert memory == pickle.loads(pickle.dumps(memory)) and "samples" not in repr(memory)


@pytest.mark.parametrize(
    ("samples", "subtype", "what"),
    [
        (np.zeros(12_800, np.int16), "PCM_16", "is silent"),
        (np.full(12_800, np.nan, np.float32), "FLOAT", "not finite"),
        (np.zeros(0, np.int16), "PCM_16", "lasts 0.000 s, but the manifest says 0.800 s"),
    ],
)
def test_an_unusable_recording_is_reported_with_its_row(folder, samples, subtype, what):
    soundfile.write(folder.path / "audio/en1.wav", samples, SAMPLE_RATE, subtype=subtype)
    folder.set(2, "sha256", "")
    folder.set(2, "audio", "audio/en1.wav")
    with pytest.raises(ValueError, match=rf"manifest\.csv row 2 \(id en1\): .*{what}.*: .+"):
        load_corpus(folder.path)[0].audio()


def test_a_truncated_recording_is_reported_with_its_row(folder):
    path = folder.path / "audio/en1.flac"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"manifest\.csv row 2 \(id en1\): .*en1\.flac .*: restore the file"):
        load_corpus(folder.path)[0].audio()


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "../../a", "a\\b", "a\nb", "a\0b", "é" * 101, "a\udcff"])
def test_an_id_has_to_be_safe_in_file_names(folder, id):
    with pytest.raises(ValueError, match="The utterance id .* cannot be part of a file name: choose one of at most"):
        Utterance(id, folder.path / "audio/en1.flac", "en", 0.8)
    if id.isprintable() and id:
        folder.set(3, "id", id)
        with pytest.raises(ValueError, match=r"manifest\.csv row 3: The utterance id .* cannot be part of a file"):
            load_corpus(folder.path)


@pytest.mark.parametrize("id", ["a", "my talk (2), 12:30?", ".a", "...", "è 日本", "é" * 100])
def test_a_safe_id_can_name_files(tmp_path, made, id):
    utterance = Utterance(id, tmp_path / "a.wav", "en", 0.8)
    path = path_of(tmp_path, "model", "en", utterance.id)
    save(made.maps(utterance=id), path, "key")
    assert load(path).utterance == id and path.parent == tmp_path / "model/en"


def test_a_column_can_name_the_target_language(folder):
    for row, cell in zip(folder.manifest, ("target_language", "de", "", ""), strict=True):
        row.append(cell)
    folder.write()
    assert [utterance.target_language for utterance in load_corpus(folder.path)] == ["de", "it", "en"]
