"""The input and the hypothesis that maps explain, ready for more passes of the model."""

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xattn.models import S2TModel


@dataclass(frozen=True)
class Forced:
    """A model, an input and an output that the decoder is forced to write.

    features: (T, F); ids: (I,), the tokens up to </s>; decoder_inputs: (P + I - 1,), the prompt of P tokens and all ids
    but the last.
    """

    model: S2TModel
    features: Tensor
    ids: Tensor
    decoder_inputs: Tensor

    @classmethod
    def of(cls, model: S2TModel, maps: xr.Dataset) -> "Forced":
        """The input and the output that maps explain.

        ValueError: the maps hold a selection of the tokens, or another model made them.
        """
        features = torch.from_numpy(np.ascontiguousarray(maps.features.values)).to(model.device)
        tokens = maps.token.values.tolist()
        ids = model.token_ids(maps.hypothesis)
        if model.tokens(ids) != tokens:  # a model can split its words in other ways than its tokenizer
            ids = model.generate(features[None], maps.setting)[0].clone()  # inference tensors allow no gradients
        if model.tokens(ids) != tokens:
            raise ValueError(
                f"{model.name} does not write the tokens of the maps of {maps.utterance}: give complete maps and the "
                "model that made them."
            )
        return cls(model, features, ids, torch.cat([model.prompt(maps.setting), ids])[:-1])

    @property
    def rows(self) -> slice:
        """The decoder positions that predict the ids."""
        return slice(len(self.decoder_inputs) - len(self.ids), None)

    def encode(self, features: Tensor) -> Tensor:
        """Encoder states (1, S, D) of features (T, F), which gradients can follow."""
        return self.model.encode(self.model.mask_input(features, torch.ones_like(features)[None]))

    def values(self, log_p: Tensor, foils: Tensor | None = None) -> Tensor:
        """What a map explains, (B, I): log-probabilities of the ids, or log-ratios of the ids to foils.

        log_p: (B, P + I - 1, V) from `decode`; foils: (I,) token ids.
        """
        log_p = log_p[:, self.rows]
        found = log_p.gather(2, self.ids.expand(len(log_p), -1)[..., None])[..., 0]
        return found if foils is None else found - log_p.gather(2, foils.expand(len(log_p), -1)[..., None])[..., 0]
