"""The base decoder: LlamaGen's class-conditional GPT, exact to the state-dict key and the rotary table.

The condition is one position before the codes and its rotary entries are (0, 0), not (1, 0): its q and k become zero
vectors. Public checkpoints were trained with that, so it must stay. Rotary tables are float32 whatever the model's
dtype, and no part of the state dict. Position p of the input predicts code p.

B batch, L length, T positions, D model_dim, N heads, H head_dim, V codebook_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.config import ModelConfig
from training.cross_entropy import wide_dtype
from training.gradient_scale import scale_gradient

Readout = Callable[[Tensor, Tensor], Any]
"""What is made of normalised states (..., D) and the head's weight (V, D): logits, a loss, drawn codes."""

NORM_EPS = 1e-5
ROTARY_BASE = 10000.0
INIT_STD = 0.02


@cache
def rotary_table(codes_per_side: int, head_dim: int, device: torch.device) -> Tensor:
    """(1 + codes_per_side**2, head_dim // 2, 2) float32 of (cos, sin), the first entry zeros (the condition).

    The first half of the interleaved pairs turns by the code's grid line, the second half by its column.
    """
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, half, 2, device="cpu").float() / half)
        angles = torch.outer(torch.arange(codes_per_side, device="cpu").float(), frequencies)
        side = codes_per_side
        by_line = angles[:, None].expand(side, side, -1)
        by_column = angles[None, :].expand(side, side, -1)
        grid = torch.cat([by_line, by_column], dim=-1).reshape(side * side, half)
        table = torch.stack([grid.cos(), grid.sin()], dim=-1)
        return torch.cat([table.new_zeros(1, half, 2), table]).to(device)


def rotate(x_BLNH: Tensor, table_LP2: Tensor) -> Tensor:
    """`x_BLNH` with its interleaved pairs turned by `table_LP2` (P = H / 2), in float32 or wider, cast back."""
    pairs = x_BLNH.to(wide_dtype(x_BLNH.dtype)).view(*x_BLNH.shape[:-1], -1, 2)
    cos, sin = table_LP2[:, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BLNH.dtype)


def feed_forward_dim(model_dim: int) -> int:
    """LlamaGen's hidden width: 8 / 3 of the model's, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * model_dim / 3) // 256) * 256


def attend(q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention (B, N, L, H); `causal` needs L == S.

    Torch's fused kernel, except in bfloat16 on a CPU: there plain products are 2 to 4 times faster forth and back
    (torch 2.13, L 64 to 256).
    """
    if q_BNLH.device.type != "cpu" or q_BNLH.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, is_causal=causal)
    scores_BNLS = (q_BNLH @ k_BNSH.transpose(-1, -2)) * float(q_BNLH.shape[-1]) ** -0.5
    if causal:
        length = q_BNLH.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=q_BNLH.device).triu(1)
        scores_BNLS = scores_BNLS.masked_fill(future, float("-inf"))
    out: Tensor = scores_BNLS.softmax(-1) @ v_BNSH
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 or wider; the weight multiplies after the cast back, as LlamaGen does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x`, same shape and dtype."""
        return self.normalised(x) * self.weight

    @staticmethod
    def normalised(x: Tensor) -> Tensor:
        """`x` over the root of its mean square."""
        wide = x.to(wide_dtype(x.dtype))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype)


class FinalNorm(RMSNorm):
    """The norm before the head."""

    def forward(self, x: Tensor, gradient_scales: Tensor | None = None) -> Tensor:
        """Normalised `x` (..., R, D); `gradient_scales` (R,) scale what each row adds to the weight's gradient."""
        if gradient_scales is None:
            return super().forward(x)
        return self.normalised(x) * scale_gradient(self.weight, gradient_scales[:, None])


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class KeyValueCache:
    """Keys and values of the positions read so far, preallocated for every layer."""

    def __init__(self, config: ModelConfig, *, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, batch_size, config.heads, config.num_positions, config.dim // config.heads)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, layer: int, *, start: int, keys_BNLH: Tensor, values_BNLH: Tensor) -> tuple[Tensor, Tensor]:
        """Stores positions `start` .. and returns keys and values of all positions so far, (B, N, start + L, H)."""
        stop = start + keys_BNLH.shape[2]
        self.keys[layer, :, :, start:stop] = keys_BNLH
        self.values[layer, :, :, start:stop] = values_BNLH
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def keep(self, batch_size: int) -> None:
        """Forgets all but the first `batch_size` samples."""
        self.keys, self.values = self.keys[:, :batch_size], self.values[:, :batch_size]


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection (q, k, v in that order)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BLD: Tensor, rotary: Tensor, *, cache: KeyValueCache | None, layer: int, start: int) -> Tensor:
        """Attention output (B, L, D); with a cache, positions before `start` are read from it."""
        batch, length, dim = x_BLD.shape
        q, k, v = self.wqkv(x_BLD).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, rotary), rotate(k, rotary), v))
        if cache is not None:
            k, v = cache.extend(layer, start=start, keys_BNLH=k, values_BNLH=v)
        if cache is not None and length > 1 and start > 0:
            raise ValueError(f"attend with a cache: after the first call 1 position at a time, got {length}; pass 1")
        out = attend(q, k, v, causal=length > 1)
        projected: Tensor = self.wo(out.transpose(1, 2).reshape(batch, length, dim))
        return projected


class Block(nn.Module):
    """Pre-norm block: attention, then feed-forward, each residual with dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, feed_forward_dim(config.dim))
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, rotary: Tensor, *, cache: KeyValueCache | None, layer: int, start: int) -> Tensor:
        """Same shape as `x_BLD`."""
        attended = self.attention(self.attention_norm(x_BLD), rotary, cache=cache, layer=layer, start=start)
        h = x_BLD + self.dropout(attended)
        out: Tensor = h + self.dropout(self.feed_forward(self.ffn_norm(h)))
        return out


class LabelEmbedding(nn.Module):
    """The table of class labels; its last entry is the null label of guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels_B: Tensor) -> Tensor:
        """(B, 1, D)."""
        out: Tensor = self.embedding_table(labels_B)[:, None]
        return out


class Head(nn.Linear):
    """The projection to logits; all that needs its weight happens in its own forward, as ZeRO-3 demands."""

    def forward(self, states: Tensor, *, readout: Readout = F.linear) -> Any:
        """What `readout` makes of states (..., D); by default logits (..., V)."""
        return readout(states, self.weight)


class CodeEmbedding(nn.Embedding):
    """The table of codes; what reads all of it does so in this module's own forward, as ZeRO-3 demands."""

    def forward(self, codes: Tensor, read: Callable[..., Tensor] | None = None, *weights: Tensor) -> Tensor:
        """(..., D) embeddings of int64 codes (...), or `read(codes, table, *weights)`."""
        return super().forward(codes) if read is None else read(codes, self.weight, *weights)


class GPT(nn.Module):
    """LlamaGen's class-conditional decoder; state-dict keys and order are LlamaGen's.

    With `recomputes_activations`, a block keeps only its input for backward and computes the rest again, with the same
    dropout.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config.num_classes, config.dim)
        self.tok_embeddings = CodeEmbedding(config.codebook_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = FinalNorm(config.dim)
        self.output = Head(config.dim, config.codebook_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes_activations = False
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)

    @property
    def null_label(self) -> int:
        """The label that stands for "no condition"."""
        return self.config.num_classes

    def embed_labels(self, labels_B: Tensor) -> Tensor:
        """(B, 1, D) of int64 labels in [0, num_classes], the last one null."""
        out: Tensor = self.cls_embedding(labels_B)
        return out

    def embed_codes(self, codes: Tensor) -> Tensor:
        """(..., D) of int64 codes (...)."""
        out: Tensor = self.tok_embeddings(codes)
        return out

    def backbone(self, x_BLD: Tensor, *, start: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        """States before the final norm.

        Args:
            x_BLD: embedded input of positions `start` .. `start + L - 1`; position 0 is the condition.
            start: first position; 0 without a cache.
            cache: keys and values of the positions before; extended in place.
        """
        table = rotary_table(self.config.codes_per_side, self.config.dim // self.config.heads, x_BLD.device)
        rotary = table[start : start + x_BLD.shape[1]]
        h = self.dropout(x_BLD)
        for layer, block in enumerate(self.layers):
            if self.recomputes_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, rotary, cache=cache, layer=layer, start=start, use_reentrant=False)
            else:
                h = block(h, rotary, cache=cache, layer=layer, start=start)
        out: Tensor = h
        return out

    def head(self, h: Tensor, *, readout: Readout = F.linear, gradient_scales: Tensor | None = None) -> Any:
        """What `readout` makes of states (..., D), normed first; by default logits (..., V) in the model's dtype.

        `gradient_scales` are those of the norm's weight (`FinalNorm`); those of the head's own are `readout`'s affair.
        """
        return self.output(self.norm(h, gradient_scales), readout=readout)

    def forward(self, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
        """Training logits (B, T, V): position p, from the label and the codes before p, predicts code p.

        Args:
            codes_BT: int64; the last code is not fed.
            labels_B: int64 in [0, num_classes].
        """
        x_BTD = torch.cat([self.embed_labels(labels_B), self.embed_codes(codes_BT[:, :-1])], dim=1)
        out: Tensor = self.head(self.backbone(x_BTD))
        return out


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Runs the body without dropout and without gradient; the module's training mode is restored."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def init_weights(module: nn.Module) -> None:
    """LlamaGen's initialisation of one module: N(0, 0.02) for Linear and Embedding weights."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
