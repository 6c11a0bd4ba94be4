"""What the examples share: text from the installation as sequences of bytes with their domain, and the options."""

from __future__ import annotations

import argparse
from bisect import bisect_right

import torch
from torch.utils.data import ConcatDataset, Dataset

from tikmix_fast.demo.corpora import Sequences, gather

LENGTH = 64

# Domains that differ widely in their influence, so that a few measured steps already show which help.
DOMAINS = ("python", "fonts", "sums", "noise")


class Mixture(Dataset[dict[str, torch.Tensor]]):
    """All domains, concatenated in the order in which MixtureSampler numbers them."""

    def __init__(self, domains: dict[str, Sequences]) -> None:
        self.lengths = {name: len(sequences) for name, sequences in domains.items()}
        self._all = ConcatDataset(list(domains.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        domain = bisect_right(self._all.cumulative_sizes, index)
        tokens = self._all[index]
        return {"input_ids": tokens, "labels": tokens, "domain": torch.tensor(domain)}


def load(domain_bytes: int = 200_000) -> tuple[Mixture, dict[str, Sequences]]:
    """Return the domains and the steered tasks."""
    corpora = gather(domain_bytes=domain_bytes, task_bytes=20_000)
    domains = {name: Sequences(corpora.domains[name], LENGTH) for name in DOMAINS}
    tasks = {name: Sequences(corpora.tasks[name].measure, LENGTH) for name in corpora.steered}
    return Mixture(domains), tasks


def task_rows(sequences: Sequences, rows: int, seed: int) -> torch.Tensor:
    """Return random sequences of a task; every seed gives others."""
    random = torch.Generator().manual_seed(seed)
    return sequences.all()[torch.randint(len(sequences), (rows,), generator=random)]


def options(description: str | None) -> dict[str, int]:
    """Read ``--steps``, ``--every`` and ``--stage`` from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=5, help="optimizer steps from one measured step to the next")
    parser.add_argument("--stage", type=int, default=50, help="optimizer steps on one mixture")
    return vars(parser.parse_args())
