"""The model card: its tables, and its text against the committed cards."""

import re

import pandas as pd
import pytest

from recipes.card import CARD, error_rates
from recipes.train import SHIPPED
from reproduction.tables import ROOT


def test_error_rates_are_corpus_rates_of_each_group():
    table = pd.DataFrame(
        {
            "reference": ["One two three.", "Four five.", "Six."],
            "hypothesis": ["one two three", "four nine", "six seven"],
            "SNR (dB)": [0.0, 0.0, 10.0],
        }
    )
    assert error_rates(table, "SNR (dB)", "it").splitlines() == [
        "| SNR (dB) | utterances | WER |",
        "|---|---|---|",
        "| 0 | 2 | 20.0 |",
        "| 10 | 1 | 100.0 |",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_committed_cards_have_the_text_of_the_template(name):
    pattern = re.sub(r"\\\{.*?\\\}", "(.*?)", re.escape(CARD))
    card = (ROOT / "data" / "models" / name / "README.md").read_text(encoding="utf-8")
    assert re.fullmatch(pattern, card, re.DOTALL)
