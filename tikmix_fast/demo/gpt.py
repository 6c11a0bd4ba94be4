"""A byte-level GPT: large enough to distinguish domains, small enough for two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikmix_fast.arguments import require_int

__all__ = ["GPT", "GPTSettings"]

BYTES = 256


@dataclass(frozen=True)
class GPTSettings:
    """Shape of the model.

    Attributes
    ----------
    layers, heads, width : int
    length : int
        Largest number of positions in a sequence.

    Raises
    ------
    ValueError
        If a number is not a positive int, or ``width`` is not a multiple of ``heads``.
    """

    layers: int = 3
    heads: int = 4
    width: int = 96
    length: int = 128

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "length"):
            require_int(name, getattr(self, name), 1)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads; got {self.width} and {self.heads}")


class _Block(nn.Module):
    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, heads, S, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.expand(self.norm_mlp(x)), approximate="tanh")
        result: Tensor = x + self.contract(hidden)
        return result


class GPT(nn.Module):
    """Predict each next byte: pre-norm blocks, learned positions, no dropout.

    Parameters
    ----------
    settings : GPTSettings
    seed : int
        Seed of the initial weights; the global random state stays as it is.

    Examples
    --------
    >>> GPT(GPTSettings(layers=1, width=8, length=16), seed=0)(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 256])
    """

    def __init__(self, settings: GPTSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.bytes = nn.Embedding(BYTES, settings.width)
            self.positions = nn.Embedding(settings.length, settings.width)
            self.blocks = nn.ModuleList(_Block(settings) for _ in range(settings.layers))
            self.norm = nn.LayerNorm(settings.width)
            self.head = nn.Linear(settings.width, BYTES, bias=False)
            self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Smaller projections into the residual stream keep its scale independent of depth, as in GPT-2.
                into_stream = name.endswith(("project.weight", "contract.weight"))
                scale = 0.02 / math.sqrt(2 * self.settings.layers) if into_stream else 0.02
                nn.init.normal_(parameter, std=scale)
            else:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, S, 256] of the byte after each position of ``tokens``, int64 [B, S]."""
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, sequences: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of every byte but the first of ``sequences``, int64 [B, S + 1]."""
        logits = self(sequences[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
