"""TensorAR around the base decoder: windows of k codes in, k predictions per position out.

Both modules are residual around the base and end in zero-initialised projections, so that a fresh TensorAR model gives
the base model's logits at every offset, bit for bit. Added parameters: (8 + 6 r) D^2 + (7 + 2 k) D, r = FFN ratio
(8.75 D^2 + 15 D at r = 1/8, k = 4). The layout is ours; the paper states the operators and the total.

Both attentions have constant queries. That is used, exactly: scores come from the query folded into the key projection,
and the output decoder's joint attention becomes one gate per head.

B batch, T positions, K window_size, D model_dim, N heads, H head_dim, V codebook_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import ModelConfig
from training.cross_entropy import wide_dtype
from training.gpt import GPT, INIT_STD, CodeEmbedding, FeedForward, Readout, RMSNorm, init_weights
from training.gradient_scale import scale_gradient
from training.mixing import attend_by_tables, attend_windows, reference_attend_windows
from training.noise import valid_offsets
from training.scored import Scored

BASE = "base."
"""What stands before LlamaGen's own key in the names of the base model's parameters."""


class FoldedKeys(nn.Linear):
    """The key projection applied to the queries instead: (q W) x = q (W x), so keys need no product of their own.

    Its weight is read in its own forward, as ZeRO-3 demands.
    """

    def forward(self, queries_QNH: Tensor) -> Tensor:
        """(Q, N, D): `key_D @ out[q, n]` is the scaled score of query q in head n."""
        _, heads, head_dim = queries_QNH.shape
        keys_NHD = self.weight.view(heads, head_dim, self.in_features)
        out: Tensor = torch.einsum("qnh,nhd->qnd", queries_QNH, keys_NHD) * float(head_dim) ** -0.5
        return out


class FoldedValues(nn.Linear):
    """The value projection as a weight for whoever mixes keys before they are projected; read in its own forward."""

    def forward(self, scale_D: Tensor) -> Tensor:
        """(D, D): the weight, its columns scaled."""
        return self.weight * scale_D


class FoldedNorm(RMSNorm):
    """A norm whose weight scales the columns of the weights behind it instead; read in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the weight, nothing normalised."""
        return x * self.weight


class WindowAttention(nn.Module):
    """The four projections that either module attends with, queries being learned constants."""

    def __init__(self, config: ModelConfig, *, values: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.heads = config.heads
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = FoldedKeys(config.dim, config.dim, bias=False)
        self.wv = values(config.dim, config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def score_weight(self, queries_QD: Tensor) -> Tensor:
        """(Q, N, D), see `FoldedKeys`."""
        out: Tensor = self.wk(split_heads(self.wq(queries_QD), self.heads))
        return out

    def values(self, keys: Tensor) -> Tensor:
        """(..., N, H) of (..., D)."""
        return split_heads(self.wv(keys), self.heads)


class InputEncoder(nn.Module):
    """e_i = Emb(x_i) + Enc(window_i): one learned query attends to the window's code and offset embeddings.

    Layout [ours]: keys and values from x = norm(Emb(code) + offset embedding); e = Emb(x_i) + wo(attention); then
    e + FFN(norm(e)). Keys are mixed before they are projected (`training.mixing`), or scores and values come from
    tables of the codes where that is cheaper (`has_tables`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, config.dim))
        self.offset_embeddings = nn.Parameter(torch.empty(config.window_size, config.dim))
        self.query_norm = RMSNorm(config.dim)
        self.key_norm = FoldedNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.attention = WindowAttention(config, values=FoldedValues)
        self.feed_forward = FeedForward(config.dim, module_hidden_dim(config))
        self.mix_and_project = reference_attend_windows
        """`attend_windows` for the native op."""

    def forward(self, windows_BTK: Tensor, valid_TK: Tensor, embedding: CodeEmbedding) -> Tensor:
        """Encoded windows (B, T, D).

        Args:
            windows_BTK: int64 codes; offset 0 is the code that the residual carries.
            valid_TK: bool; offsets outside the image are not attended to.
            embedding: the base model's table of codes.
        """
        codes_MK = windows_BTK.masked_fill(~valid_TK, -1).flatten(0, 1)
        weights = self.attention_weights()
        if has_tables(codebook_size=embedding.num_embeddings, num_windows=len(codes_MK)):
            attended_MD = embedding(codes_MK, attend_by_tables, *weights)
        else:
            attended_MD = embedding(codes_MK, self.mix_and_project, *weights)
        return self.encode(embedding(windows_BTK[..., 0]), attended_MD)

    def attention_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """What windows are attended with beside the table of codes, as `training.mixing` takes it."""
        score_weight_ND = self.key_norm(self.attention.score_weight(self.query_norm(self.query))[0])
        value_weight_DD = self.attention.wv(self.key_norm(torch.ones_like(self.query[0])))
        value_weight_NHD = value_weight_DD.view(self.attention.heads, -1, value_weight_DD.shape[1])
        return self.offset_embeddings, score_weight_ND, value_weight_NHD

    def encode(self, embedded_BTD: Tensor, attended_MD: Tensor) -> Tensor:
        """Encoded windows (B, T, D) from the codes at offset 0 and what the query takes from each window."""
        h = embedded_BTD + self.attention.wo(attended_MD).view(embedded_BTD.shape)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


def has_tables(*, codebook_size: int, num_windows: int) -> bool:
    """Whether the input encoder projects every code of the table, and not every window: whichever are fewer."""
    return codebook_size < num_windows


@dataclass(frozen=True)
class DecoderConstants:
    """What the output decoder's attention takes from its queries alone."""

    score_weight_CD: Tensor
    """C = K N."""
    threshold_KN: Tensor
    """Score at which a state gets half of the attention."""
    constant_KNH: Tensor
    """What each query takes from the queries."""


class OutputDecoder(nn.Module):
    """z_{i,j} = h_i + Dec_j(h_i): joint self-attention over [h_i; q_1 .. q_k], then a small feed-forward.

    Layout [ours]: z_j = h + wo(attention of query j over [norm(h); norm(q_1 .. q_k)]); then z_j + FFN(norm(z_j)). Keys
    and values of q_1 .. q_k are constants, hence attention is gate * value(h) + (1 - gate) * constant, per head and j.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.window_size, config.dim))
        self.query_norm = RMSNorm(config.dim)
        self.state_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.attention = WindowAttention(config)
        self.feed_forward = FeedForward(config.dim, module_hidden_dim(config))

    def forward(
        self, h_BTD: Tensor, scored: Scored | None = None, *, constants: DecoderConstants | None = None
    ) -> Tensor:
        """(B, T, K, D) states, one per offset; or (B, R, D), those that are scored, and no others are computed.

        Where `scored.draft_gradient_scale` is below 1, offsets >= 1 read `h_BTD` once more, through the scale: values
        are the same bits, the modules' gradients are whole, and those of `h_BTD` are scaled. `constants` are those of
        `self.constants()`, where the weights stay as they are.
        """
        known = self.constants() if constants is None else constants
        if scored is None:
            gate, values_BTNH = self._read(h_BTD, known)
            h, values, constant = h_BTD[:, :, None], values_BTNH[:, :, None], known.constant_KNH
        else:
            h, gate, values = _of_scored(h_BTD, *self._read(h_BTD, known), scored)
            constant = scored.of_offset(known.constant_KNH)
            if scored.draft_gradient_scale != 1.0:
                scaled_BTD = scale_gradient(h_BTD, scored.draft_gradient_scale)
                pairs = zip(
                    (h, gate, values), _of_scored(scaled_BTD, *self._read(scaled_BTD, known), scored), strict=True
                )
                h, gate, values = (scored.join_offsets(*pair) for pair in pairs)
        attended = constant + gate[..., None] * (values - constant)
        z = h + self.attention.wo(attended.flatten(-2))
        out: Tensor = z + self.feed_forward(self.ffn_norm(z))
        return out

    def _read(self, h_BTD: Tensor, known: DecoderConstants) -> tuple[Tensor, Tensor]:
        """Gates (B, T, K, N) and values (B, T, N, H) of backbone states."""
        states_BTD = self.state_norm(h_BTD)
        scores = (states_BTD @ known.score_weight_CD.transpose(0, 1)).to(known.threshold_KN.dtype)
        scores_BTKN = scores.view(*scores.shape[:-1], -1, self.attention.heads)
        gate_BTKN = torch.sigmoid(scores_BTKN - known.threshold_KN).to(h_BTD.dtype)
        return gate_BTKN, self.attention.values(states_BTD)

    def constants(self) -> DecoderConstants:
        """What does not depend on the backbone's states."""
        queries_KD = self.query_norm(self.queries)
        score_weight_KND = self.attention.score_weight(queries_KD)
        own_KNK = (score_weight_KND @ queries_KD.transpose(0, 1)).to(wide_dtype(self.queries.dtype))
        shares_KNK = own_KNK.softmax(-1).to(self.queries.dtype)
        return DecoderConstants(
            score_weight_CD=score_weight_KND.flatten(0, 1),
            threshold_KN=own_KNK.logsumexp(-1),
            constant_KNH=torch.einsum("qnk,knh->qnh", shares_KNK, self.attention.values(queries_KD)),
        )


def _of_scored(h_BTD: Tensor, gate_BTKN: Tensor, values_BTNH: Tensor, scored: Scored) -> tuple[Tensor, ...]:
    """States, gates and values of the scored predictions, (B, R, ...) each."""
    return scored.of_position(h_BTD), scored.of_prediction(gate_BTKN), scored.of_position(values_BTNH)


class TensorAR(nn.Module):
    """The base model and, where window_size > 1, the two modules around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.base = GPT(config)
        self.input_encoder = InputEncoder(config) if config.window_size > 1 else None
        self.output_decoder = OutputDecoder(config) if config.window_size > 1 else None
        self.ops: Literal["native", "reference"] = "reference"
        for module in (self.input_encoder, self.output_decoder):
            if module is not None:
                _init_module(module)

    @property
    def null_label(self) -> int:
        """The label that stands for "no condition"."""
        return self.base.null_label

    def use_native_ops(self) -> None:
        """Compute with the native ops from now on (`training.ops`), which fit float32 and bfloat16."""
        self.ops = "native"
        if self.input_encoder is not None:
            self.input_encoder.mix_and_project = attend_windows

    def embed_windows(self, windows_BLK: Tensor, *, start: int = 0) -> Tensor:
        """(B, L, D) of the windows that start at codes `start` .. `start + L - 1`."""
        if self.input_encoder is None:
            return self.base.embed_codes(windows_BLK[..., 0])
        length, window_size = windows_BLK.shape[1:]
        valid = valid_offsets(self.config.num_positions, window_size=window_size, device=windows_BLK.device)
        out: Tensor = self.input_encoder(windows_BLK, valid[start : start + length], self.base.tok_embeddings)
        return out

    def predict(self, h_BTD: Tensor, *, scored: Scored | None = None, readout: Readout = F.linear) -> Any:
        """What `readout` makes of the predictions of backbone states; by default logits (B, T, K, V).

        Args:
            h_BTD: states before the final norm.
            scored: which predictions; none is all of them.
            readout: is given their normalised states, (B, T, K, D) or scored (B, R, D), and the head's weight.
        """
        if self.output_decoder is not None:
            states = self.output_decoder(h_BTD, scored)
        else:
            states = h_BTD[:, :, None] if scored is None else h_BTD  # one offset: every position is scored
        gradient_scales_R = None if scored is None else scored.gradient_scales
        return self.base.head(states, readout=readout, gradient_scales=gradient_scales_R)

    def forward(
        self, windows_BTK: Tensor, labels_B: Tensor, *, scored: Scored | None = None, readout: Readout = F.linear
    ) -> Any:
        """What `readout` makes of training predictions: position p, offset j predicts code p + j.

        Position 0 is predicted from the label, position p from windows 0 .. p - 1; the last window is not fed. By
        default logits (B, T, K, V) in the model's dtype; training reads a loss out instead (`training.loss`).

        Args:
            windows_BTK: int64; window i starts at code i (see `training.noise.noise_windows`).
            labels_B: int64 in [0, num_classes], the last one null.
            scored: see `predict`, as the next.
            readout: its tensors pass through DeepSpeed's hooks alone, or in a tuple, list or dict.

        Raises:
            ValueError: the windows' size is not the model's.
        """
        if windows_BTK.shape[2] != self.config.window_size:
            raise ValueError(
                f"predict from windows: they must hold window_size = {self.config.window_size} codes, "
                f"got {windows_BTK.shape[2]}; make them with the model's window_size"
            )
        x_BTD = torch.cat([self.base.embed_labels(labels_B), self.embed_windows(windows_BTK[:, :-1])], dim=1)
        return self.predict(self.base.backbone(x_BTD), scored=scored, readout=readout)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., D) as (..., N, H)."""
    return x.reshape(*x.shape[:-1], heads, -1)


def module_hidden_dim(config: ModelConfig) -> int:
    """Hidden width of the modules' feed-forward."""
    return max(1, round(config.dim * config.module_ffn_ratio))


def num_added_parameters(config: ModelConfig) -> int:
    """Parameters of the TensorAR modules: 8 D^2 + 6 D hidden + (7 + 2 K) D; 0 at window_size 1."""
    if config.window_size == 1:
        return 0
    return config.dim * (8 * config.dim + 6 * module_hidden_dim(config) + 7 + 2 * config.window_size)


def is_of_base(name: str) -> bool:
    """Whether a parameter of a `TensorAR` belongs to the base model, by its name."""
    return name.startswith(BASE)


def build_model(config: ModelConfig) -> TensorAR:
    """A freshly initialised model on the CPU, drawn from torch's default generator."""
    return TensorAR(config)


def _init_module(module: InputEncoder | OutputDecoder) -> None:
    module.apply(init_weights)
    for name, parameter in module.named_parameters(recurse=False):
        assert name in ("query", "offset_embeddings", "queries"), name
        nn.init.normal_(parameter, std=INIT_STD)
    nn.init.zeros_(module.attention.wo.weight)
    nn.init.zeros_(module.feed_forward.w2.weight)
