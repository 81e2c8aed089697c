"""A TensorAR whose weights stay as they are while it samples: what does not depend on codes is computed once.

Windows are looked up in tables of all codes where the codebook has fewer codes than windows will be read; else they are
mixed, with the weights folded once. The decoder's constants are kept too. It must not outlive a change of the weights.

B batch, L length, K window_size, D model_dim, V codebook_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from training.gpt import KeyValueCache, Readout, positions_from
from training.mixing import attend_from_tables, window_tables
from training.noise import valid_offsets
from training.ops import project_states
from training.tensorar import TensorAR, has_tables


class FrozenModel:
    """The parts of a model that sampling calls, in the model's dtype and on its device.

    Args:
        model: in evaluation mode.
        num_windows: how many windows it will read, for the choice between tables and mixing.
    """

    def __init__(self, model: TensorAR, *, num_windows: int) -> None:
        self.model = model
        self.config = model.config
        self.null_label = model.null_label
        self.ops = model.ops
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        is_native = self.ops == "native" and self.device.type == "cpu" and self.dtype == torch.float32
        self._project: Readout = project_states if is_native else F.linear
        self._valid_TK = valid_offsets(
            model.config.num_positions, window_size=model.config.window_size, device=self.device
        )
        encoder, decoder = model.input_encoder, model.output_decoder
        self._constants = None if decoder is None else decoder.constants()
        self._weights = None if encoder is None else encoder.attention_weights()
        self._tables = None
        if self._weights is not None and has_tables(codebook_size=model.config.codebook_size, num_windows=num_windows):
            self._tables = window_tables(model.base.tok_embeddings.weight, *self._weights)

    def embed_labels(self, labels_B: Tensor) -> Tensor:
        """(B, 1, D) of int64 labels in [0, num_classes], the last one null."""
        return self.model.base.embed_labels(labels_B)

    def embed_windows(self, windows_BLK: Tensor, *, start: int | Tensor) -> Tensor:
        """(B, L, D) of the windows that start at codes `start` .. `start + L - 1`.

        Args:
            windows_BLK: int64 codes; what lies beyond the image is not read.
            start: (B,) int64 where it differs by sample. A window that starts beyond the last code is embedded as the
                last one, and means nothing.
        """
        encoder, embedding = self.model.input_encoder, self.model.base.tok_embeddings
        if encoder is None or self._weights is None:
            return self.model.base.embed_codes(windows_BLK[..., 0])
        starts_BL = positions_from(start, windows_BLK.shape[1]).clamp(max=len(self._valid_TK) - 1)
        codes_MK = windows_BLK.masked_fill(~self._valid_TK[starts_BL], -1).flatten(0, 1)
        if self._tables is not None:
            attended_MD = attend_from_tables(codes_MK, self._tables)
        else:
            attended_MD = embedding(codes_MK, encoder.mix_and_project, *self._weights)
        return encoder.encode(embedding(windows_BLK[..., 0]), attended_MD)

    def read(self, x_BLD: Tensor, *, start: int | Tensor, cache: KeyValueCache) -> Tensor:
        """Backbone states (B, L, D), see `GPT.backbone`."""
        return self.model.base.backbone(x_BLD, start=start, cache=cache)

    def predict(self, h_BLD: Tensor, *, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits (B, L, K, V) of backbone states, in float32 or wider.

        `mix` makes of the normalised states (B, L, K, D) those that the head sees, by default all of them.
        """
        decoder = self.model.output_decoder
        states = h_BLD[:, :, None] if decoder is None else decoder(h_BLD, constants=self._constants)
        readout = self._project if mix is None else lambda states, weight: self._project(mix(states), weight)
        logits: Tensor = self.model.base.head(states, readout=readout)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
