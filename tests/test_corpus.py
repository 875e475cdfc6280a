import csv
import hashlib
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xattn.audio import SAMPLE_RATE
from xattn.data.corpus import load_corpus
from xattn.data.manifest import utterances_from_manifest
from xattn.data.tables import read_rows
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
        utterances_from_manifest(tmp_path)


@pytest.mark.parametrize("column", ["id", "audio", "language", "transcript"])
def test_a_missing_column_raises(folder, column):
    folder.set(1, column, "other")
    with pytest.raises(ValueError, match=rf"manifest\.csv has no column {column}: add it to the header"):
        load_corpus(folder.path)


@pytest.mark.parametrize("column", ["id", "audio", "language", "transcript"])
def test_an_empty_cell_raises(folder, column):
    folder.set(3, column, " ")
    id = "" if column == "id" else r" \(id en2\)"
    with pytest.raises(ValueError, match=rf"manifest\.csv row 3{id} has an empty {column}: fill it in or drop the row"):
        load_corpus(folder.path)


@pytest.mark.parametrize(("first", "second"), [("en1", "en1"), ("en1", "EN1"), ("perch\u00e9", "perche\u0301")])
def test_a_repeated_id_raises(folder, first, second):
    # File systems that ignore case or normalise names would store two such utterances in one file.
    folder.set(2, "id", first)
    folder.set(4, "id", second)
    with pytest.raises(ValueError, match=rf"manifest\.csv row 4 \(id {second}\) repeats the id of row 2: rename one"):
        load_corpus(folder.path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("en1,en,audio/en1.flac,yes, it is", "has 5 cells, but the header has 4: quote cells that contain commas"),
        ("en1,en,audio/en1.flac,yes,", "has 5 cells, but the header has 4: quote cells that contain commas"),
        ("en1,en,audio/en1.flac", "has 3 cells, but the header has 4: add the missing ones"),
    ],
)
@pytest.mark.parametrize(("delimiter", "name"), [(",", "commas"), (";", "semicolons"), ("\t", "tabs")])
def test_a_wrong_number_of_cells_raises(folder, line, message, delimiter, name):
    text = f"id,language,audio,transcript\n\nen1,en,audio/en1.flac,no\n{line}\n".replace(",", delimiter)
    (folder.path / "manifest.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.csv row 4 \(id en1\) {message.replace('commas', name)}\."):
        load_corpus(folder.path)


def test_another_encoding_raises(folder):
    folder.write(encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"manifest\.csv is not encoded in UTF-8: save it again as CSV in UTF-8 \(see line 3\)\."
    ):
        load_corpus(folder.path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", ", "])
def test_tables_of_other_programs_are_read(folder, encoding, end, delimiter):
    expected = load_corpus(folder.path)
    for name in ("manifest.csv", "words.csv"):
        with open(folder.path / name, newline="", encoding="utf-8") as file:
            rows = [*csv.reader(file)]
        rows[0] = [column.capitalize() for column in rows[0]]
        quoted = [[f'"{cell}"' if set(cell) & set(",;") else cell for cell in row] for row in rows]
        text = end.join(delimiter.join(row) for row in quoted)
        (folder.path / name).write_bytes(text.encode(encoding))
    assert load_corpus(folder.path) == expected


def test_blank_lines_count_as_rows(folder):
    table = folder.path / "manifest.csv"
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(["", header, "", lines[0], "", "", lines[1]]), encoding="utf-8")
    assert [utterance.row for utterance in load_corpus(folder.path)] == [4, 7]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32", "cp1252"])
def test_an_encoding_that_is_not_known_raises(folder, encoding):
    folder.write(encoding=encoding)
    with pytest.raises(ValueError, match=r"manifest\.csv is not encoded in UTF-8: save it again as CSV in UTF-8"):
        load_corpus(folder.path)


def test_columns_without_a_name(folder):
    index = [["", "0", "1", "2"], ["", "", "", ""]]  # as pandas writes it, and as spreadsheets do
    folder.manifest = [[first, *row, last] for row, first, last in zip(folder.manifest, *index, strict=True)]
    folder.write()
    assert len(load_corpus(folder.path)) == 3
    folder.manifest[2][-1] = "it is"
    folder.write()
    message = (
        r"row 3 \(id en2\) has a cell in a column without a name: name the column, or quote cells that contain com"
    )
    with pytest.raises(ValueError, match=message):
        load_corpus(folder.path)


WORDS_OF_A_CELL = st.text(st.sampled_from('abcè ,;"'), max_size=8).map(lambda text: f"x{text}".strip())
ROWS = st.lists(st.tuples(WORDS_OF_A_CELL, WORDS_OF_A_CELL, WORDS_OF_A_CELL), min_size=1, max_size=6)
HEADER = ("id", "language", "transcript")


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([HEADER, *rows])


@given(rows=ROWS, delimiter=st.sampled_from(",;\t"), quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
@settings(max_examples=60, deadline=None)
def test_rows_are_read_as_they_were_written(tmp_path_factory, rows, delimiter, quoting):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_csv(path, rows, delimiter=delimiter, quoting=quoting)
    expected = [(number, dict(zip(HEADER, row, strict=True))) for number, row in enumerate(rows, start=2)]
    assert [*read_rows(path, HEADER)] == expected


@given(
    rows=ROWS,
    delimiter=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_quote_that_is_lost_never_loses_a_row(tmp_path_factory, rows, delimiter, quoting, data):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_csv(path, rows, delimiter=delimiter, quoting=quoting)
    text = path.read_text(encoding="utf-8")
    quotes = [index for index, character in enumerate(text) if character == '"']
    assume(quotes)
    lost = data.draw(st.sampled_from(quotes))
    path.write_text(text[:lost] + text[lost + 1 :], encoding="utf-8")
    try:
        found = [*read_rows(path, HEADER)]
    except ValueError as error:
        assert str(error).startswith(f"{path} ") and str(error).endswith(".")
    else:
        assert len(found) == len(rows)


def test_rows_are_not_kept_in_memory(tmp_path):
    path, number = tmp_path / "t.csv", 20_000
    write_csv(path, ((f"utterance-{n}", "en", f"the sentence with the number {n}") for n in range(number)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, HEADER)) == number
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.2e6 < path.stat().st_size


QUOTE = "has a quote that is not closed, or a quote inside a quoted cell that is not doubled: correct the quotes"
CELL = "has a cell of more than 131,072 characters: look for a quote that is not closed"
GOES_ON = (
    "has a cell that goes on to line {} and contains the start of another row: look for a quote that is not closed"
)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['a,en,audio/en1.flac,"yes', "b,en,audio/en1.flac,no"], f"row 2 {QUOTE}"),
        (['a,en,audio/en1.flac,"yes"', 'b,en,audio/en1.flac,"no'], f"row 3 {QUOTE}"),
        (['a,en,audio/en1.flac,"yes', 'b,en,audio/en1.flac,"no"'], f"row 2 {QUOTE}"),
        (['a,en,audio/en1.flac,"yes', 'b,en,audio/en1.flac,no"'], f"row 2 {GOES_ON.format(3)}"),
        (
            ['a,en,audio/en1.flac,"yes', "b,en,audio/en1.flac,so", 'c,en,audio/en1.flac,no"'],
            f"row 2 {GOES_ON.format(4)}",
        ),
        (['a,"en,audio/en1.flac,yes', 'b,en",audio/en1.flac,no'], f"row 2 {GOES_ON.format(3)}"),
        (['a,en,audio/en1.flac,"two\nlines"', 'b,en,audio/en1.flac,"no'], rf"row 3 \(line 4\) {QUOTE}"),
        (['a,en,audio/en1.flac,"he said "yes""'], f"row 2 {QUOTE}"),
        (['a,en,audio/en1.flac,"he said \\"yes\\""'], f"row 2 {QUOTE}"),
        (['a,en,audio/en1.flac,"yes', *["b,en,audio/en1.flac,yes it is"] * 9999], f"row 2 {CELL}"),
    ],
)
def test_a_quote_that_is_not_closed_raises(folder, lines, message):
    (folder.path / "manifest.csv").write_text("\n".join(["id,language,audio,transcript", *lines, ""]))
    with pytest.raises(ValueError, match=rf"manifest\.csv {message}\.$"):
        load_corpus(folder.path)


def test_a_quote_that_is_not_closed_in_the_words_raises(folder):
    with open(folder.path / "words.csv", "a") as file:
        file.write('it1,"gatto,0.7,0.75\n')
    with pytest.raises(ValueError, match=rf"words\.csv row 7 {QUOTE}"):
        load_corpus(folder.path)


def test_a_cell_can_have_several_lines(folder):
    text = "one, two,\nthree, four, five, six"
    folder.set(2, "transcript", text)
    assert load_corpus(folder.path)[0].transcript == text


@pytest.mark.parametrize("name", ["manifest.csv", "words.csv"])
@pytest.mark.parametrize("spelling", [str, str.upper, " {} ".format])
def test_a_repeated_column_raises(folder, name, spelling):
    table = folder.path / name
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    column = header.split(",")[1]
    rows = [f"{header},{spelling(column)}", *(f"{line},x" for line in lines)]
    table.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"{name} row 1 has more than one column {column}: rename or drop all but one"
    ):
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
        (4, "0.1", "0.8", r"the word 'sleeps' from 0\.1 to 0\.8 s is out of order after one that starts at 0\.2"),
        (
            4,
            "0.7",
            "0.6",
            r"the word 'sleeps' from 0\.7 to 0\.6 s is out of order after one that starts at 0\.2 s: list",
        ),
        (2, "-0.1", "0.1", r"the word 'the' from -0\.1 to 0\.1 s is out of order after one that starts at 0 s: list"),
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
        (np.zeros(0, np.int16), "PCM_16", "holds no samples"),
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
