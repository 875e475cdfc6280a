"""Make the small maps of Whisper that the lessons read where the reader has no model of their own.

`python -m recipes.lessons data/whisper/faster-whisper-tiny.en` explains four recordings of the corpus and writes their
maps to data/lessons, without the variables that no lesson reads.
"""

import argparse
import sys

import numpy as np
import xarray as xr

from reproduction.lessons import SHIPPED, divergence_when_hidden
from reproduction.tables import ROOT
from xattn.attribution.forced import Forced
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance
from xattn.explain import Occlusion, explain
from xattn.models import S2TModel, load_model
from xattn.store import key_of, path_of, save, save_index

# Whisper tiny.en transcribes the second and the third without an error, the first with some, and the last one not at
# all. In the first two, the attention of a token rests in a pause.
RECORDINGS = ("en-dev-0010", "en-dev-0040", "en-test-0014", "en-test-0024")
DIRECTION = "en"
OCCLUSION = Occlusion(4000, 4000, precision="bfloat16", reliability=0.8)  # as in notebooks/profiles/whisper.yaml
DROPPED = ("input_scores", "encoder_scores", "input_halves", "encoder_halves", "padding_attention")
LEVELS = 32  # of the spectrogram, which is only looked at, in a unit of the features


def small_maps(model: S2TModel, utterance: Utterance) -> xr.Dataset:
    """Explain an utterance and keep what the lessons read.

    Attention is averaged over layers and heads, of which one each remains, and numbers are rounded.
    `divergence_when_hidden` (token, step) of `reproduction.lessons` is added.
    """
    maps = explain(model, utterance, occlusion=OCCLUSION)
    found = divergence_when_hidden(Forced.of(model, maps), maps, maps.step)
    average = maps.cross_attention.mean(["layer", "head"])
    return maps.drop_vars([*DROPPED, "cross_attention", "layer", "head"]).assign(
        cross_attention=average.expand_dims(["layer", "head"]).astype(np.float16),
        features=(np.rint(LEVELS * maps.features) / LEVELS).astype(np.float16),
        segment_weight=maps.segment_weight.astype(np.float16),
        segmentation=maps.segmentation.astype(np.int16),
        encoder_saliency=maps.encoder_saliency.astype(np.float16),
        divergence_when_hidden=found.astype(np.float16),
    )


def main() -> int:
    """Run the command. Exit code 2: the model or the corpus cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m recipes.lessons", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Whisper tiny.en, as a folder or an id on the Hugging Face hub")
    try:
        model = load_model(parser.parse_args().model)
        corpus = {utterance.id: utterance for utterance in load_corpus(ROOT / "data", language=DIRECTION)}
        keys = {}
        for id in RECORDINGS:
            maps = small_maps(model, corpus[id])
            keys[id] = key_of({"weights": model.weights_hash, "audio": maps.audio, "lesson": id})
            save(maps, path_of(ROOT / SHIPPED, model.name, DIRECTION, id), keys[id])
        save_index(keys, ROOT / SHIPPED, model.name, DIRECTION, {id: corpus[id].transcript for id in RECORDINGS})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
