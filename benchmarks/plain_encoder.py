"""The input encoder's attention as written first, for benchmarks to compare with."""

import torch
from torch import Tensor, nn

from training.gpt import RMSNorm


class PlainEncoder(nn.Module):
    """Embedding, offset embedding, norm, keys and values of every offset, attention of a learned query."""

    def __init__(self, dim: int, *, heads: int, window_size: int, codebook_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(codebook_size, dim)
        self.offsets = nn.Parameter(torch.randn(window_size, dim) * 0.02)
        self.query = nn.Parameter(torch.randn(heads, 1, dim // heads))
        self.norm = RMSNorm(dim)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)

    def forward(self, codes_MK: Tensor) -> Tensor:
        """(M, D)."""
        x = self.norm(self.embedding(codes_MK) + self.offsets)
        k, v = (layer(x).view(*codes_MK.shape, self.heads, -1).transpose(1, 2) for layer in (self.wk, self.wv))
        shares = (self.query * k).sum(-1).mul(float(v.shape[-1]) ** -0.5).softmax(-1)
        return (shares[..., None] * v).sum(2).flatten(1)
