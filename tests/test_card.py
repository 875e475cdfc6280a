"""The model card's tables."""

import pandas as pd

from recipes.card import by


def test_error_rates_are_grouped_and_corpus_wide():
    table = pd.DataFrame(
        {
            "reference": ["One two three.", "Four five.", "Six."],
            "hypothesis": ["one two three", "four nine", "six seven"],
            "SNR (dB)": [0.0, 0.0, 10.0],
        }
    )
    assert by(table, "SNR (dB)", "it").splitlines() == [
        "| SNR (dB) | utterances | WER |",
        "|---|---|---|",
        "| 0 | 2 | 20.0 |",
        "| 10 | 1 | 100.0 |",
    ]
