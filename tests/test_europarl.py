"""The shipped corpus in the layout of EuroParl-ST, with m4a speeches."""

import hashlib
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_europarl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

from xattn.audio import SAMPLE_RATE, load_audio
from xattn.data import europarl
from xattn.data.corpus import load_corpus
from xattn.data.europarl import Defects, Segment, prepare, read_segments, utterances_from_europarl
from xattn.data.tables import read_rows

DATA = Path(__file__).parents[1] / "data"
# The rate of each speech's m4a file, and its number of segments.
SPEECHES = {
    "en": {"en.20080924.31.3-243": (44_100, 3), "en.20090112.19.1-141": (48_000, 2)},
    "it": {"it.20081118.7.4-052": (32_000, 2), "it.20110406.15.1-166": (16_000, 2)},
}
COUNTS = {("en", "test"): 5, ("it", "test"): 4}
SILENCE = np.zeros(SAMPLE_RATE // 4, np.float32)

Made = namedtuple("Made", "root spoken")  # spoken: the samples in the m4a, by segment id


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Two speeches in each language: recordings of the shipped corpus, a quarter of a second apart."""
    root, spoken = tmp_path_factory.mktemp("europarl") / "v1.1", {}
    for source, target in (("en", "it"), ("it", "en")):
        recordings, speeches = iter(load_corpus(DATA, language=source, split="test")), {}
        for name, (rate, number) in SPEECHES[source].items():
            pieces, segments, time = [SILENCE], [], SILENCE.size / SAMPLE_RATE
            for n in range(1, number + 1):
                recording = next(recordings)
                start, end = round(time, 2), round(time + recording.duration, 2)  # the corpus has hundredths
                segments.append((start, end, recording.transcript, recording.translation))
                pieces += [recording.audio(), SILENCE]
                time += recording.duration + SILENCE.size / SAMPLE_RATE
                spoken[f"{name}_{n}"] = start, end
            samples = np.concatenate(pieces)
            speeches[name] = samples, rate, segments
            for n in range(1, number + 1):
                start, end = spoken[f"{name}_{n}"]
                spoken[f"{name}_{n}"] = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        write_europarl(root, source, target, "test", speeches)
    return Made(root, spoken)


@pytest.fixture
def root(archive, tmp_path, monkeypatch):
    """A copy that a test can damage; its segments count as the complete archive."""
    monkeypatch.setattr(europarl, "SEGMENTS", COUNTS)
    return Path(shutil.copytree(archive.root, tmp_path / "v1.1"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the speeches that are decoded, in order."""
    names = []

    def record(path):
        if path.suffix == ".m4a":
            names.append(path.stem)
        return load_audio(path)

    monkeypatch.setattr(europarl, "load_audio", record)
    return names


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_numbers_of_segments_are_the_paper_s():
    assert europarl.SEGMENTS == {("en", "test"): 1130, ("it", "test"): 1686}


def test_every_segment_has_its_texts(root, tmp_path):
    utterances = prepare(root, tmp_path / "corpus")
    expected = [f"{name}_{n}" for own in SPEECHES.values() for name, (_, k) in own.items() for n in range(1, k + 1)]
    assert [utterance.id for utterance in utterances] == expected
    for language, target in (("en", "it"), ("it", "en")):
        found = load_corpus(tmp_path / "corpus", language=language, split="test")
        originals = load_corpus(DATA, language=language, split="test")[: len(found)]
        assert len(found) == COUNTS[language, "test"]
        for utterance, original in zip(found, originals, strict=True):
            assert (utterance.language, utterance.target_language, utterance.split) == (language, target, "test")
            assert utterance.reference(language) == original.transcript
            assert utterance.reference(f"{language}-{target}") == original.translation
            assert utterance.duration == pytest.approx(original.duration, abs=0.01)


def test_segments_start_and_end_at_their_times(archive, root, tmp_path):
    # The encoder starts with 1,024 samples of priming. Counted as speech, they would move a segment by 23 to 64 ms.
    for utterance in prepare(root, tmp_path / "corpus"):
        original, segment = archive.spoken[utterance.id], utterance.audio()
        assert segment.size == original.size
        correlation = correlate(segment, original, method="fft")
        assert correlation.argmax() - (original.size - 1) == 0, f"lag of {utterance.id} in samples"
        assert correlation.max() / np.linalg.norm(segment) / np.linalg.norm(original) > 0.95  # AAC is lossy


def test_segments_are_16_bit_flac_with_their_hash(root, tmp_path):
    for utterance in prepare(root, tmp_path / "corpus"):
        header = soundfile.info(utterance.audio_path)
        assert (header.format, header.subtype, header.samplerate, header.channels) == ("FLAC", "PCM_16", 16_000, 1)
        samples, _ = soundfile.read(utterance.audio_path, dtype="int16")
        assert hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() == utterance.sha256
        assert utterance.duration == samples.size / 16_000


def test_sources_and_licence_are_recorded(root, tmp_path, capsys):
    prepare(root, tmp_path / "corpus")
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "corpus/SHA256SUMS").read_text().splitlines())
    assert sums == {file.relative_to(root).as_posix(): sha256(file) for file in root.rglob("*") if file.is_file()}
    card = (tmp_path / "corpus/README.md").read_text(encoding="utf-8")
    assert "Licence: CC BY-NC 4.0." in card and sha256(tmp_path / "corpus/SHA256SUMS") in card
    assert "- en test: 5 segments, 0.0" in card and "- it test: 4 segments, 0.0" in card
    assert card in capsys.readouterr().out


def test_nothing_is_decoded_twice(root, tmp_path, decoded):
    first = prepare(root, tmp_path / "corpus")
    assert decoded == [*SPEECHES["en"], *SPEECHES["it"]]
    before = contents(tmp_path / "corpus")
    decoded.clear()
    assert prepare(root, tmp_path / "corpus") == first
    assert decoded == [] and contents(tmp_path / "corpus") == before


def test_an_interrupted_call_resumes(root, tmp_path, monkeypatch):
    prepare(root, tmp_path / "undisturbed")
    speeches, done = [*SPEECHES["en"], *SPEECHES["it"]], []

    def interrupted(path):
        if path.stem == speeches[2]:
            raise KeyboardInterrupt
        return load_audio(path)

    def record(path):
        done.append(path.stem)
        return load_audio(path)

    monkeypatch.setattr(europarl, "load_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "corpus")
    assert len([*(tmp_path / "corpus").rglob("*.flac")]) == 5
    assert not (tmp_path / "corpus/manifest.csv").exists()  # half a test set is never mistaken for a complete one
    monkeypatch.setattr(europarl, "load_audio", record)
    prepare(root, tmp_path / "corpus")
    assert [name for name in done if name in speeches] == speeches[2:]
    assert contents(tmp_path / "corpus") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["gone", "cut short", "flipped", "other audio"])
def test_a_damaged_segment_is_cut_again(root, tmp_path, decoded, damage):
    segment = prepare(root, tmp_path / "corpus")[3].audio_path
    before, content = contents(tmp_path / "corpus"), bytearray(segment.read_bytes())
    decoded.clear()
    if damage == "gone":
        segment.unlink()
    elif damage == "cut short":
        segment.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        segment.write_bytes(content)
    else:
        shutil.copy(segment.with_name("en.20080924.31.3-243_1.flac"), segment)
    prepare(root, tmp_path / "corpus")
    assert decoded == ["en.20090112.19.1-141"] and contents(tmp_path / "corpus") == before


def test_segments_with_new_times_or_a_new_speech_are_cut_again(root, tmp_path, decoded):
    first = prepare(root, tmp_path / "corpus")
    decoded.clear()
    edit(root / "en/it/test/segments.lst", "en.20090112.19.1-141 0.25", "en.20090112.19.1-141 0.35")
    shutil.copy(root / "it/audios/it.20081118.7.4-052.m4a", root / "it/audios/it.20110406.15.1-166.m4a")
    second = prepare(root, tmp_path / "corpus", partial=True)
    assert decoded == ["en.20090112.19.1-141", "it.20110406.15.1-166"]
    assert second[3].duration == pytest.approx(first[3].duration - 0.1)
    assert second[3].sha256 != first[3].sha256 and second[:3] == first[:3]


LST, EN, IT = (f"en/it/test/segments.{kind}" for kind in ("lst", "en", "it"))
SPEECH = "en.20080924.31.3-243"


def without_last_line(file):
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message", "left"),
    [
        (lambda r: (r / LST).unlink(), r"There is no .*segments\.lst: give the folder of EuroParl-ST 1\.1 that", 4),
        (lambda r: shutil.rmtree(r / "it"), r"There is no .*it.en.test.segments\.lst: give the folder", 5),
        (lambda r: without_last_line(r / EN), r"segments\.en has 4 lines, but segments\.lst has 5, so it is", 4),
        (lambda r: without_last_line(r / IT), r"segments\.it has 4 lines, but segments\.lst has 5, so it is", 4),
        (
            lambda r: [without_last_line(r / file) for file in (LST, EN, IT)],
            r"segments\.lst lists 4 segments, but EuroParl-ST 1\.1 has 5\.",
            8,
        ),
        (
            lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} 0.25 x"),
            r"segments\.lst line 1 is '.* x .*', but a spe",
            8,
        ),
        (lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} a"), r"segments\.lst line 1 is '.* a .*', but a spee", 8),
        (lambda r: edit(r / LST, f"{SPEECH} 0.25", "../x 0.25"), r"segments\.lst line 1 is '\.\./x .*', but a spee", 8),
        (
            lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} 99"),
            r"line 1 goes from 99 to [\d.]+ s, which is not",
            8,
        ),
        (
            lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} nan"),
            r"line 1 goes from nan to [\d.]+ s, which is not",
            8,
        ),
        (
            lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} -1"),
            r"line 1 goes from -1 to [\d.]+ s, which is not",
            8,
        ),
        (lambda r: (r / f"en/audios/{SPEECH}.m4a").unlink(), r"lst line 1 names the speech .*m4a, which is missing", 6),
    ],
)
def test_an_incomplete_copy_raises_before_anything_is_decoded(root, tmp_path, decoded, damage, message, left):
    damage(root)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(root, tmp_path / "corpus")
    assert str(caught.value).splitlines()[1:] == [
        "Unpack the archive again, or continue without them with --partial (partial=True); the numbers are then not "
        "those of the paper's test sets."
    ]
    assert decoded == [] and not (tmp_path / "corpus").exists()
    assert len(prepare(root, tmp_path / "corpus", partial=True)) == left
    assert str(caught.value).splitlines()[0] in (tmp_path / "corpus/README.md").read_text(encoding="utf-8")


def test_a_bad_line_does_not_hide_a_missing_speech(root, tmp_path):
    edit(root / LST, f"{SPEECH} 0.25", f"{SPEECH} a")
    (root / f"en/audios/{SPEECH}.m4a").unlink()
    with pytest.raises(ValueError, match=r"(?s)line 1 is .* line 2 names the speech .*, which is missing\.\nUnpack"):
        prepare(root, tmp_path / "corpus")


def test_ids_do_not_change_when_a_line_is_skipped(root, tmp_path):
    edit(root / LST, f"{SPEECH} 0.25", f"{SPEECH} a")
    assert [u.id for u in prepare(root, tmp_path / "corpus", partial=True)][:3] == [
        f"{SPEECH}_2",
        f"{SPEECH}_3",
        "en.20090112.19.1-141_1",
    ]


def test_a_damaged_speech_does_not_affect_the_others(root, tmp_path, decoded):
    speech = root / f"en/audios/{SPEECH}.m4a"
    whole = speech.read_bytes()
    speech.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"segments\.lst line 1: .*{SPEECH}\.m4a ends after \d+ of the \d+ bytes"):
        prepare(root, tmp_path / "corpus")
    assert len(decoded) == 4 and not (tmp_path / "corpus/manifest.csv").exists()
    speech.write_bytes(whole)
    decoded.clear()
    assert len(prepare(root, tmp_path / "corpus")) == 9 and decoded == [SPEECH]


def test_a_segment_can_end_slightly_after_its_speech(root, tmp_path):
    # This is the last segment of a speech; AAC fills up its last frame, so the decoded audio is slightly longer.
    *_, line = (root / LST).read_text().splitlines()
    name, start, _ = line.split()
    seconds = load_audio(root / f"en/audios/{name}.m4a").size / SAMPLE_RATE
    edit(root / LST, line, f"{name} {start} {seconds + 0.4}")
    (utterance,) = prepare(root, tmp_path / "corpus")[4:5]
    assert utterance.duration == pytest.approx(seconds - float(start), abs=1e-3)
    edit(root / LST, f"{seconds + 0.4}", f"{seconds + 0.6}")
    with pytest.raises(ValueError, match=rf"segments\.lst line 5 ends at .* s, but .*{name}\.m4a lasts only [\d.]+ s"):
        prepare(root, tmp_path / "corpus")
    assert [u.id for u in prepare(root, tmp_path / "corpus", partial=True)][3:5] == [
        f"{name}_1",
        "it.20081118.7.4-052_1",
    ]


def test_a_segment_that_starts_after_its_speech_raises(root, tmp_path):
    *_, line = (root / LST).read_text().splitlines()
    name = line.split()[0]
    seconds = load_audio(root / f"en/audios/{name}.m4a").size / SAMPLE_RATE
    edit(root / LST, line, f"{name} {seconds + 0.1} {seconds + 0.4}")
    with pytest.raises(ValueError, match=r"segments\.lst line 5 ends at .* s, but .* lasts only"):
        prepare(root, tmp_path / "corpus")


@pytest.mark.parametrize(("file", "kind"), [(EN, "transcript"), (IT, "translation")])
def test_a_segment_without_text_is_skipped_and_reported(root, tmp_path, capsys, file, kind):
    lines = (root / file).read_text(encoding="utf-8").split("\n")
    (root / file).write_text("\n".join([lines[0], " ", *lines[2:]]), encoding="utf-8")
    utterances = prepare(root, tmp_path / "corpus")
    assert [u.id for u in utterances][:2] == [f"{SPEECH}_1", f"{SPEECH}_3"]  # the others keep their ids
    sentence = rf"{root / LST} line 2 has no {kind}, so the segment is skipped."
    assert sentence in capsys.readouterr().out and sentence in (tmp_path / "corpus/README.md").read_text()


def test_a_silent_segment_is_skipped_and_reported(root, tmp_path, monkeypatch, capsys):
    def silenced(path):
        audio = load_audio(path)
        if path.stem == SPEECH:
            audio[: 2 * SAMPLE_RATE] = 0
        return audio

    edit(root / LST, (root / LST).read_text().splitlines()[0], f"{SPEECH} 0.25 1.75")
    monkeypatch.setattr(europarl, "load_audio", silenced)
    assert [u.id for u in prepare(root, tmp_path / "corpus")][:2] == [f"{SPEECH}_2", f"{SPEECH}_3"]
    printed = capsys.readouterr().out
    assert f"{root / LST} line 1: " in printed and "_1.flac is silent" in printed
    assert "another channel. The segment is skipped." in printed


def test_disk_space_is_checked_first(root, tmp_path, monkeypatch, decoded):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 0, 10**5))
    with pytest.raises(OSError, match=r"The segments need up to \d\.\d MB, but .*corpus has 0\.1 MB: free some"):
        prepare(root, tmp_path / "corpus")
    assert decoded == []


@pytest.mark.parametrize("file", ["manifest.csv", "README.md"])
def test_other_files_are_not_overwritten(root, tmp_path, corpus_folder, decoded, file):
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    (tmp_path / "corpus/manifest.csv").rename(tmp_path / "corpus" / file)
    before = contents(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"corpus holds files that were not made from EuroParl-ST 1\.1: choose a"):
        prepare(root, tmp_path / "corpus")
    assert decoded == [] and contents(tmp_path / "corpus") == before


def test_a_complete_list_has_no_defects(tmp_path):
    write_list(tmp_path, [("en.x", i, i + 1, f"text {i}", f"testo {i}") for i in range(1130)])
    defects = Defects()
    assert len(read_segments(tmp_path, "en", "it", "test", defects)) == 1130 and defects == Defects()


def test_an_error_lists_at_most_ten_defects():
    with pytest.raises(ValueError) as caught:
        Defects(missing=[f"Defect {i}." for i in range(25)]).refuse(partial=False)
    assert str(caught.value).splitlines()[9:11] == ["Defect 9.", "There are 15 more such defects."]


def write_list(root, rows, blank=" ", end="\n"):
    """Write en/it/test and empty files for its speeches."""
    folder = root / "en/it/test"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "en/audios").mkdir(exist_ok=True)
    for name in {row[0] for row in rows}:
        (root / f"en/audios/{name}.m4a").touch()
    lists = {
        "lst": [blank.join(map(str, row[:3])) for row in rows],
        "en": [r[3] for r in rows],
        "it": [r[4] for r in rows],
    }
    for kind, lines in lists.items():
        (folder / f"segments.{kind}").write_bytes("".join(line + end for line in lines).encode())


TEXTS = (
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(len)
)
STRETCHES = st.tuples(st.integers(0, 10**6), st.integers(1, 10**4)).map(lambda t: (t[0] / 100, (t[0] + t[1]) / 100))
SHORT = st.tuples(st.integers(0, 199), st.integers(1, 100)).map(lambda t: (t[0] / 100, (t[0] + t[1]) / 100))


@given(
    rows=st.lists(st.tuples(st.sampled_from(["en.1", "en.2-3", "x"]), STRETCHES, TEXTS, TEXTS), min_size=1, max_size=8),
    blank=st.sampled_from([" ", "\t", "   "]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60, deadline=None)
def test_lists_are_read_as_they_were_written(tmp_path_factory, rows, blank, end):
    root, defects = tmp_path_factory.mktemp("lists"), Defects()
    write_list(root, [(name, *times, *texts) for name, times, *texts in rows], blank, end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(europarl, "SEGMENTS", {})
        segments = read_segments(root, "en", "it", "test", defects)
    assert defects == Defects()
    assert [(s.speech.stem, (s.start, s.end), s.transcript, s.translation) for s in segments] == rows
    assert len({s.id for s in segments}) == len(rows)
    assert all(s.id.startswith("en.") for s in segments)  # so no Italian segment has the same id
    table = [{"id": s.id, "transcript": s.transcript, "translation": s.translation} for s in segments]
    europarl.write_manifest(root, table)
    assert [row for _, row in read_rows(root / "manifest.csv", ("id",))] == table


@given(stretches=st.lists(SHORT, min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_segment_holds_the_speech_from_start_to_end(tmp_path_factory, stretches, seed):
    folder = tmp_path_factory.mktemp("cut")
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, 3 * SAMPLE_RATE).astype(np.int16)
    segments = [
        Segment(str(n), Path("en.m4a"), start, end, "en", "it", "test", "a", "b", f"line {n}")
        for n, (start, end) in enumerate(stretches)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(europarl, "load_audio", lambda path: (samples / 2**15).astype(np.float32))
        europarl.cut(segments, folder, dict.fromkeys(segments, "origin"), Defects())
    for segment, (start, end) in zip(segments, stretches, strict=True):
        found, _ = soundfile.read(folder / segment.audio, dtype="int16")
        np.testing.assert_array_equal(found, samples[round(100 * start) * 160 : round(100 * end) * 160])


def test_the_archive_itself_is_a_corpus(root, tmp_path, archive, capsys, decoded):
    utterances = load_corpus(root, split="test")
    assert capsys.readouterr().out == f"{root} is read as EuroParl-ST: 9 utterances; en-it, it-en; test.\n"
    prepared = prepare(root, tmp_path / "corpus")
    for own, cut in zip(utterances, prepared, strict=True):
        for name in ("id", "language", "target_language", "split", "transcript", "translation"):
            assert getattr(own, name) == getattr(cut, name)
        assert own.duration == pytest.approx(cut.duration, abs=1e-3)
        np.testing.assert_allclose(own.audio(), cut.audio(), atol=0.51 / 2**15)  # half a step of 16-bit samples
    assert load_corpus(root, language="it") == utterances[5:]
    assert load_corpus(root / "en/it") == load_corpus(root / "en/it/test") == utterances[:5]
    assert load_corpus(root.parent, language="en", split="test") == utterances[:5]


def test_speeches_of_the_archive_are_decoded_when_they_are_needed(root, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "xattn.data.utterance.load_audio", lambda audio, **_: decoded.append(audio) or load_audio(audio)
    )
    utterances = utterances_from_europarl(root, language="en")
    assert decoded == []
    parts = [utterance.audio() for utterance in utterances[:3]]
    assert [path.name for path in decoded if isinstance(path, Path)] == [f"{SPEECH}.m4a"]
    parts[0][:] = 0  # is a copy
    assert utterances[0].audio().any()


def test_a_part_of_a_speech_that_is_silent_raises(root, monkeypatch):
    silence = np.zeros(9 * SAMPLE_RATE, np.float32)
    monkeypatch.setattr("xattn.data.utterance._decoded", lambda *_: silence)
    with pytest.raises(ValueError, match=rf"{SPEECH}\.m4a from 0\.25 to [\d.]+ s: The audio given is silent"):
        utterances_from_europarl(root)[0].audio()


def test_other_directions_of_the_archive(root):
    for target in ("de", "fr"):
        shutil.copytree(root / "en/it", root / f"en/{target}")
        (root / f"en/{target}/test/segments.it").rename(root / f"en/{target}/test/segments.{target}")
    assert {(u.language, u.target_language) for u in load_corpus(root)} == {("en", "it"), ("it", "en")}
    assert {u.target_language for u in load_corpus(root / "en/de")} == {"de"}
    shutil.rmtree(root / "en/it")
    shutil.rmtree(root / "it/en")
    with pytest.raises(ValueError, match=r"has translations from en into de, fr: give the folder .*, such as en/de\."):
        load_corpus(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / IT).unlink(), r"There is no .*segments\.it: unpack the archive again\."),
        (
            lambda r: without_last_line(r / EN),
            r"segments\.en has 4 lines, but segments\.lst has 5, .*; unpack the arch",
        ),
        (
            lambda r: edit(r / LST, f"{SPEECH} 0.25", f"{SPEECH} a"),
            r"segments\.lst line 1 is '.* a .*', but a spe.*; unp",
        ),
        (
            lambda r: (r / f"en/audios/{SPEECH}.m4a").unlink(),
            r"line 1 names the speech .*, which is missing; unpack the",
        ),
        (
            lambda r: shutil.rmtree(r / "en/audios"),
            r"line 1 names .* missing \(and there are 1 more defects\); unpack",
        ),
        (
            lambda r: (r / f"en/audios/{SPEECH}.m4a").write_bytes(b"no"),
            rf"lst line 1: .*{SPEECH}\.m4a cannot be read as",
        ),
        (
            lambda r: shutil.copytree(r / "en", r / "copy/en"),
            r"v1\.1 holds two copies of EuroParl-ST 1\.1, .*v1\.1 and .*copy: give one of them",
        ),
    ],
)
def test_faults_of_the_archive(root, damage, message):
    damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_corpus(root)
    assert "\n" not in str(caught.value)


def test_segments_beyond_their_speech_raise(root):
    *_, line = (root / LST).read_text().splitlines()
    name, start, _ = line.split()
    edit(root / LST, line, f"{name} {start} 99")
    with pytest.raises(ValueError, match=rf"lst line 5 ends at 99 s, but .*{name}\.m4a lasts only [\d.]+ s: unpack"):
        load_corpus(root)


def test_segments_of_the_archive_without_text_are_counted(root, capsys):
    lines = (root / EN).read_text(encoding="utf-8").split("\n")
    (root / EN).write_text("\n".join([lines[0], " ", *lines[2:]]), encoding="utf-8")
    assert [u.id for u in load_corpus(root, language="en")][:2] == [f"{SPEECH}_1", f"{SPEECH}_3"]
    assert f"{root}: segments skipped without transcript or translation: 1.\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no utterance of language 'de': choose among en test, it test\."):
        load_corpus(root, language="de")
    with pytest.raises(
        FileNotFoundError, match=r"There is no segments\.lst in .*audios: give the folder of EuroParl-ST"
    ):
        utterances_from_europarl(root / "en/audios")


def test_dev_can_be_prepared_beside_test(archive, root, tmp_path):
    for source, target in europarl.PAIRS:
        shutil.copytree(root / source / target / "test", root / source / target / "dev")
        for file in (root / source / target / "dev").iterdir():
            file.write_text(file.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    utterances = prepare(root, tmp_path / "corpus", splits=["dev"])
    assert [(u.id, u.split) for u in utterances] == [(f"{SPEECH}_1", "dev"), ("it.20081118.7.4-052_1", "dev")]
    assert len(prepare(root, tmp_path / "corpus")) == 9


def test_the_command_reports_its_result(root, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["europarl", *map(str, arguments)])
        return europarl.main()

    assert run(root, tmp_path / "corpus") == 0
    assert f"{SPEECH}.m4a 1/4: 3 segments" in capsys.readouterr().out
    assert run(tmp_path / "nowhere", tmp_path / "corpus") == 1
    assert capsys.readouterr().err.startswith(f"error: There is no {tmp_path / 'nowhere'}")
    assert run(tmp_path / "nowhere", tmp_path / "other", "--partial") == 1
    assert "holds no usable segment: give the folder" in capsys.readouterr().err
    assert len(load_corpus(tmp_path / "corpus")) == 9
