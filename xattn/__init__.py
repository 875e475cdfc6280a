"""Cross-attention of speech-to-text models, set beside what their output really depends on."""

from xattn.compare import correlate
from xattn.corpus import load_corpus, utterance_from_file
from xattn.explain import explain
from xattn.models import load_model
from xattn.sources import utterances_from_dataset, utterances_from_folder, utterances_from_table

__version__ = "0.1.0"
__all__ = [
    "correlate",
    "explain",
    "load_corpus",
    "load_model",
    "utterance_from_file",
    "utterances_from_dataset",
    "utterances_from_folder",
    "utterances_from_table",
]
