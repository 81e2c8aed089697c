"""The base decoder: LlamaGen's class-conditional GPT, exact to the state-dict key and the rotary table.

The condition is one position before the codes and its rotary entries are (0, 0), not (1, 0): its q and k become zero
vectors. Public checkpoints were trained with that, so it must stay. Rotary tables are float32 whatever the model's
dtype, and no part of the state dict. Position p of the input predicts code p.

B batch, L length, T positions, D model_dim, N heads, H head_dim, V codebook_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """`x_BLNH` with its interleaved pairs turned by `table_LP2` (P = H / 2), or (B, L, P, 2), in float32 or wider."""
    pairs = x_BLNH.to(wide_dtype(x_BLNH.dtype)).view(*x_BLNH.shape[:-1], -1, 2)
    cos, sin = table_LP2[..., None, :, :].unbind(-1)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BLNH.dtype)


def feed_forward_dim(model_dim: int) -> int:
    """LlamaGen's hidden width: 8 / 3 of the model's, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * model_dim / 3) // 256) * 256


def attend(
    q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, causal: bool, visible_BLS: Tensor | None = None
) -> Tensor:
    """Softmax attention (B, N, L, H) to all positions, to those before (`causal`, which needs L == S) or `visible_BLS`.

    Torch's fused kernel, except in bfloat16 on a CPU: there plain products are 2 to 4 times faster forth and back
    (torch 2.13, L 64 to 256).
    """
    visible = None if visible_BLS is None else visible_BLS[:, None]
    if q_BNLH.device.type != "cpu" or q_BNLH.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, attn_mask=visible, is_causal=causal)
    scores_BNLS = (q_BNLH @ k_BNSH.transpose(-1, -2)) * float(q_BNLH.shape[-1]) ** -0.5
    if causal:
        length = q_BNLH.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool, device=q_BNLH.device).tril()
    if visible is not None:
        scores_BNLS = scores_BNLS.masked_fill(~visible, float("-inf"))
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
    """Keys and values of the positions read so far, preallocated for every layer.

    A sample may read some positions again, and others than its neighbours in the batch: entries from a call's start on
    are overwritten by it.
    """

    def __init__(
        self, config: ModelConfig, *, batch_size: int, dtype: torch.dtype, device: torch.device, num_spare: int = 0
    ) -> None:
        positions = config.num_positions + num_spare
        shape = (config.layers, batch_size, config.heads, positions, config.dim // config.heads)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def batch_size(self) -> int:
        """Samples that it holds."""
        return self.keys.shape[1]

    def extend(
        self, layer: int, *, start: int | Tensor, keys_BNLH: Tensor, values_BNLH: Tensor, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Stores positions `start` .. (of each sample) and returns keys and values before `stop`, (B, N, stop, H)."""
        length = keys_BNLH.shape[2]
        for kept, new_BNLH in ((self.keys[layer], keys_BNLH), (self.values[layer], values_BNLH)):
            if isinstance(start, int):
                kept[:, :, start : start + length] = new_BNLH
            else:
                samples_B1 = torch.arange(len(start), device=start.device)[:, None]
                kept[samples_B1, :, positions_from(start, length)] = new_BNLH.transpose(1, 2)
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def keep(self, kept_B: Tensor) -> Tensor:
        """Forgets the samples where `kept_B` is false; returns which of the samples before is now in each place."""
        count = int(kept_B.sum())
        order = torch.arange(count, device=kept_B.device)
        holes, moved = (~kept_B[:count]).nonzero()[:, 0], count + kept_B[count:].nonzero()[:, 0]
        order[holes] = moved
        for entries in (self.keys, self.values):
            entries[:, holes] = entries[:, moved]
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]
        return order


def positions_from(start: int | Tensor, length: int) -> Tensor:
    """(B, L) int64 positions `start_B` .. `start_B + L - 1`; on the CPU and (1, L) where the start is a number."""
    start_B = torch.tensor([start]) if isinstance(start, int) else start
    return start_B[:, None] + torch.arange(length, device=start_B.device)


@dataclass(frozen=True)
class Span:
    """The positions that one call of the backbone reads, made once for all layers."""

    rotary: Tensor
    """(L, P, 2), or (B, L, P, 2)."""
    cache: KeyValueCache | None = None
    start: int | Tensor = 0
    """First position; (B,) int64 where it differs by sample."""
    stop: int = 0
    """Behind the last position that any sample reads."""
    visible_BLS: Tensor | None = None
    """Which positions each position attends to; none where it is all that came before and itself."""


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection (q, k, v in that order)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BLD: Tensor, *, span: Span, layer: int) -> Tensor:
        """Attention output (B, L, D); with a cache, positions before the span are read from it."""
        batch, length, dim = x_BLD.shape
        q, k, v = self.wqkv(x_BLD).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, span.rotary), rotate(k, span.rotary), v))
        if span.cache is not None:
            k, v = span.cache.extend(layer, start=span.start, keys_BNLH=k, values_BNLH=v, stop=span.stop)
        causal = length > 1 and span.visible_BLS is None
        out = attend(q, k, v, causal=causal, visible_BLS=span.visible_BLS)
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

    def forward(self, x_BLD: Tensor, *, span: Span, layer: int) -> Tensor:
        """Same shape as `x_BLD`."""
        attended = self.attention(self.attention_norm(x_BLD), span=span, layer=layer)
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

    def backbone(self, x_BLD: Tensor, *, start: int | Tensor = 0, cache: KeyValueCache | None = None) -> Tensor:
        """States before the final norm.

        Args:
            x_BLD: embedded input of positions `start` .. `start + L - 1`; position 0 is the condition.
            start: first position; (B,) int64 where it differs by sample; 0 without a cache. What is computed beyond
                the last position (in spare entries of the cache) means nothing.
            cache: keys and values of the positions before; extended in place.
        """
        span = self._span(x_BLD.shape[1], start=start, cache=cache, device=x_BLD.device)
        h = self.dropout(x_BLD)
        for layer, block in enumerate(self.layers):
            if self.recomputes_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, span=span, layer=layer, use_reentrant=False)
            else:
                h = block(h, span=span, layer=layer)
        out: Tensor = h
        return out

    def _span(self, length: int, *, start: int | Tensor, cache: KeyValueCache | None, device: torch.device) -> Span:
        table = rotary_table(self.config.codes_per_side, self.config.dim // self.config.heads, device)
        if isinstance(start, int):
            rotary, stop = table[start : start + length], start + length
        else:
            rotary = table[positions_from(start, length).clamp(max=len(table) - 1)]
            stop = int(start.max()) + length
        if cache is None or (isinstance(start, int) and (start == 0 or length == 1)):
            return Span(rotary=rotary, cache=cache, start=start, stop=stop)
        positions_BL = positions_from(start, length).to(device)
        visible_BLS = torch.arange(stop, device=device) <= positions_BL[..., None]
        return Span(rotary=rotary, cache=cache, start=start, stop=stop, visible_BLS=visible_BLS)

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
