"""What cross-attention explains in speech-to-text models, and what it leaves out.

model = xattn.load_model("data/models/base")
maps = xattn.explain(model, "recording.wav")
xattn.correlate(maps.cross_attention, maps.input_saliency)
"""

from importlib.metadata import version

from xattn.analysis.correlation import correlate
from xattn.analysis.cues import attention_suffices
from xattn.attribution.settings import Occlusion
from xattn.data.corpus import load_corpus
from xattn.data.europarl import utterances_from_europarl
from xattn.data.layouts import utterances_from_common_voice, utterances_from_librispeech, utterances_from_timit
from xattn.data.pauses import cut_at_pauses
from xattn.data.readers import utterances_from_dataset, utterances_from_folder, utterances_from_table
from xattn.data.utterance import Utterance, utterance_from_file
from xattn.explain import explain
from xattn.explorer import explore
from xattn.models import Decoding, load_model
from xattn.runs import explain_corpus
from xattn.store import load_maps
from xattn.words import save_words, word_times

__version__ = version("xattn")
__all__ = [
    "Decoding",
    "Occlusion",
    "Utterance",
    "attention_suffices",
    "correlate",
    "cut_at_pauses",
    "explain",
    "explain_corpus",
    "explore",
    "load_corpus",
    "load_maps",
    "load_model",
    "save_words",
    "utterance_from_file",
    "utterances_from_common_voice",
    "utterances_from_dataset",
    "utterances_from_europarl",
    "utterances_from_folder",
    "utterances_from_librispeech",
    "utterances_from_table",
    "utterances_from_timit",
    "word_times",
]
