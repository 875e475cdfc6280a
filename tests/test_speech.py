"""The corpus of real recordings for the profile `whisper`."""

import csv

import numpy as np
import pytest

from recipes.speech import LIST, chosen, write_corpus
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance

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
    assert chosen([other, *reversed(english)]) == english  # one language is enough
    write_corpus(chosen([*utterances("it"), *english])[38:42], tmp_path)
    written = load_corpus(tmp_path, split="test")
    assert [each.id for each in written] == [row["id"] for row in ROWS[38:42]]
    assert [each.transcript for each in written] == [f"text of {row['id']}" for row in ROWS[38:42]]
    np.testing.assert_allclose(written[0].audio(), english[0].samples, atol=2**-15)


@pytest.mark.parametrize(("missing", "number"), [(1, 1), (40, 55)])
def test_missing_utterances_are_reported(missing, number):
    sentence = f"^{number} utterances of .*speech.csv are in none of these corpora, such as {ROWS[0]['id']}: give the "
    with pytest.raises(ValueError, match=sentence):
        chosen(utterances("en")[missing:])
