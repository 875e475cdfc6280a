"""The corpora of real recordings for the profiles `whisper` and `timit`."""

import csv

import numpy as np
import pytest

from recipes.speech import LISTS, chosen, write_corpus
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance, Word

LIST = LISTS["speech"]

with LIST.open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))


def utterances(language):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 8_000).astype(np.float32)
    ids = [row["id"] for row in ROWS if row["language"] == language]
    return [Utterance(id, None, language, 0.5, transcript=f"text of {id}", samples=samples) for id in ids]


def test_the_list_has_40_english_and_15_italian_recordings_with_their_sources():
    languages = [row["language"] for row in ROWS]
    assert (languages.count("en"), languages.count("it"), len({row["id"] for row in ROWS})) == (40, 15, 55)
    assert all(row["source"] for row in ROWS)


def test_utterances_are_written_in_the_order_of_the_list(tmp_path):
    other = Utterance("other", None, "en", 0.5)
    english = utterances("en")
    assert chosen([other, *reversed(english)], LIST) == english  # one language is enough
    write_corpus(chosen([*utterances("it"), *english], LIST)[38:42], tmp_path, LIST.name)
    written = load_corpus(tmp_path, split="test")
    assert [each.id for each in written] == [row["id"] for row in ROWS[38:42]]
    assert [each.transcript for each in written] == [f"text of {row['id']}" for row in ROWS[38:42]]
    np.testing.assert_allclose(written[0].audio(), english[0].samples, atol=2**-15)


@pytest.mark.parametrize(("missing", "number"), [(1, 1), (40, 55)])
def test_missing_utterances_are_reported(missing, number):
    sentence = f"^{number} utterances of .*speech.csv are in none of these corpora, such as {ROWS[0]['id']}: give the "
    with pytest.raises(ValueError, match=sentence):
        chosen(utterances("en")[missing:], LIST)


def test_the_times_of_words_are_written_even_if_neighbours_overlap(tmp_path):
    samples = np.zeros(16_000, np.float32)
    words = (Word("she", 0.1, 0.3125), Word("had", 0.25, 0.5), Word('"your"', 0.5, 0.75))
    timed = Utterance("one", None, "en", 1.0, transcript="she had your", samples=samples, words=words)
    write_corpus([timed, Utterance("two", None, "en", 1.0, transcript="x", samples=samples)], tmp_path, "timit.csv")
    assert [each.words for each in load_corpus(tmp_path)] == [words, ()]


def test_the_list_of_timit_alternates_speakers_and_has_no_sentence_that_all_read():
    with LISTS["timit"].open(encoding="utf-8", newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    speakers, sentences = zip(*(each.split("_") for each in ids), strict=True)
    assert (len(set(ids)), len(set(speakers))) == (72, 9)
    assert all(len(set(speakers[first : first + 9])) == 9 for first in range(0, 72, 9))
    assert not any(each.startswith("sa") for each in sentences)
