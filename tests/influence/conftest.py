"""Models with every kind of parameter that is captured, and influence by per-example autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikmix_fast import InfluenceEngine, shifted_mask

VOCABULARY = 37


class Batch(NamedTuple):
    """Token ids and labels [B, S] (-100 = no loss), and the domain of every row [B] or position [B, S]."""

    x: Tensor
    labels: Tensor
    ids: Tensor | None = None


class HandWrittenNorm(nn.Module):
    """As LlamaRMSNorm, with Gemma's 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normal * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


class Zoo(nn.Module):
    """No attention, and one use of a parameter after another: positions do not see each other."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width, padding_idx=3)
        self.positions = nn.Embedding(24, width)
        self.more_positions = nn.Parameter(0.1 * torch.randn(24, width))
        self.norm = nn.LayerNorm(width)
        self.bare_norm = nn.LayerNorm(width, bias=False)
        self.rms = nn.RMSNorm(width)
        self.hand = HandWrittenNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.raw = nn.Parameter(0.3 * torch.randn(width, width))
        self.packed_bias = nn.Parameter(0.1 * torch.randn(2 * width))
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))
        self.shared = nn.Linear(width, width)
        self.head_bias = nn.Parameter(0.1 * torch.randn(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        # Positions looked up once, [S, C], then reshaped and scaled before they meet the batch.
        positions = 0.5 * self.positions(torch.arange(length))[None]
        h = self.tokens(x) + positions
        h += self.more_positions[:length]
        h = h + self.down(F.relu(self.up(self.norm(h)), inplace=True))
        first, second = self.packed_bias.chunk(2)
        h = self.bare_norm(h) @ self.raw + first
        h = h + self.gate * torch.tanh(self.hand(h) * (1 + second))
        h = h + self.normed(self.rms(h))
        for _ in range(2):
            h = h + 0.5 * torch.tanh(self.shared(h))
        return F.linear(h, self.tokens.weight, self.head_bias)


class Attentive(nn.Module):
    """A small decoder with attention, tied through its own forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(24, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def block(self, h: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return h + self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.block(h) @ self.tokens.weight.T


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=24, **ids))


def _llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
        )
    )


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "zoo": Zoo,
    "attentive": Attentive,
    "gpt2": _gpt2,
    "llama": lambda: _llama(False),
    "llama-tied": lambda: _llama(True),
}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    model = _MAKERS[kind]().eval()
    # Norms and biases start at one and zero, where a wrong derivative could hide.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_batch(seed: int, rows: int, length: int, ids: Any = None, masked: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = x.masked_fill(torch.rand(x.shape, generator=generator) < masked, -100)
    return Batch(x, labels, None if ids is None else torch.as_tensor(ids))


def token_losses(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Loss of every position [B, S]; zero where there is no target."""
    output = model(x)
    logits = output if isinstance(output, Tensor) else output.logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return F.pad(losses, (0, 1))


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return token_losses(model, batch.x, batch.labels).sum() / shifted_mask(batch.labels).sum()


class Truth(NamedTuple):
    """Influence [n, m] and |q_i| |g_j| [n, m], both float64."""

    values: Tensor
    scale: Tensor

    def error(self, values: Any) -> float:
        """Largest |difference| / (|q_i| |g_j|), as design.md measures it."""
        return float(((torch.as_tensor(values) - self.values).abs() / self.scale).max())


def per_example_influence(
    model: nn.Module,
    tasks: Mapping[str, Sequence[Batch]],
    batches: Sequence[Batch],
    n_domains: int,
    scaling: Mapping[str, Tensor] | None = None,
) -> Truth:
    """Every row (or position) by its own backward in float64; ``scaling`` is a diagonal P by parameter name."""
    wide = copy.deepcopy(model).double()
    named = dict(wide.named_parameters())

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
        return torch.cat([each.flatten() for each in found])

    def per_row(batch: Batch) -> list[Tensor]:
        return [
            gradient(token_losses(wide, batch.x[b : b + 1], batch.labels[b : b + 1]).sum()) for b in range(len(batch.x))
        ]

    p = torch.ones(sum(value.numel() for value in named.values()), dtype=torch.float64)
    if scaling is not None:
        p = torch.cat([scaling[name].double().flatten() for name in named])
    queries = []
    for given in tasks.values():
        total = torch.stack([row for batch in given for row in per_row(batch)]).sum(0)
        queries.append(p * total / sum(int(shifted_mask(batch.labels).sum()) for batch in given))
    sums, tokens = torch.zeros(n_domains, len(p), dtype=torch.float64), torch.zeros(n_domains, dtype=torch.float64)
    for batch in batches:
        mask = shifted_mask(batch.labels)
        if batch.ids.ndim == 1:
            for row, domain, targets in zip(per_row(batch), batch.ids, mask.sum(1), strict=True):
                sums[domain] += row
                tokens[domain] += targets
        else:
            losses = token_losses(wide, batch.x, batch.labels)
            for domain in batch.ids.unique():
                here = batch.ids == domain
                sums[domain] += gradient(losses[here].sum())
                tokens[domain] += (mask & here).sum()
    means = sums / tokens[:, None]
    stacked = torch.stack(queries)
    return Truth(stacked @ means.T, stacked.norm(dim=1)[:, None] * means.norm(dim=1)[None])


def measure(
    model: nn.Module, tasks: Mapping[str, Sequence[Batch]], batches: Sequence[Batch], n_domains: int, **options: Any
) -> InfluenceEngine:
    """Run an engine over the batches, each with its mask and its mean loss."""
    names = [f"d{j}" for j in range(n_domains)]
    engine = InfluenceEngine(model, domains=names, tasks=list(tasks), **{"check_every": 1, "batch_dim": 0, **options})
    for name, given in tasks.items():
        for batch in given:
            with engine.task(name, mask=shifted_mask(batch.labels)):
                mean_loss(model, batch).backward()
    for batch in batches:
        with engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
            mean_loss(model, batch).backward()
    return engine


class Kit(NamedTuple):
    """What the tests of the engine share."""

    make_model: Callable[[str], nn.Module]
    make_batch: Callable[..., Batch]
    token_losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    mean_loss: Callable[[nn.Module, Batch], Tensor]
    per_example_influence: Callable[..., Truth]
    measure: Callable[..., InfluenceEngine]
    Batch: type[Batch]


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit(make_model, make_batch, token_losses, mean_loss, per_example_influence, measure, Batch)
