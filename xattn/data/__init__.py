"""Utterances and corpora: the manifest format, readers of other layouts, EuroParl-ST."""
