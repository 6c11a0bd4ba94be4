"""The text of the study: the built-in corpora, one scarce domain, and one that helps only early."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.study.settings import StudySettings
from tikmix_fast.demo.corpora import Bytes, Corpora, Sequences, gather

__all__ = ["EARLY", "NOISE", "SHORT", "Problem", "cut_up"]

SHORT, EARLY, NOISE = "docstrings", "fragments", "noise"
_FRAGMENT = 3
_OWN = {"numpy docs": "docstrings", "torch docs": "docstrings", "matplotlib": "python", "fonttools": "python"}


@dataclass(frozen=True)
class Problem:
    """The domains to train on and the tasks to train for.

    Attributes
    ----------
    domains : dict of str to Sequences
    steered : dict of str to Sequences
        Text of the steered tasks that methods may see.
    reported : dict of str to Sequences
        Text of all tasks on which losses are reported. It has no other use.
    own : tuple of str
        The domains with the same kind of text as a steered task.
    fingerprint : str
        Fingerprint of all text: results of different texts must not be mixed.
    """

    domains: dict[str, Sequences]
    steered: dict[str, Sequences]
    reported: dict[str, Sequences]
    own: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, corpora: Corpora, settings: StudySettings) -> Problem:
        """Cut ``corpora`` into sequences, and make the scarce and the early domain from its docstrings."""
        length = settings.main.model.length
        text = dict(corpora.domains)
        if SHORT in text:
            text[SHORT], rest = text[SHORT][: settings.short_bytes], text[SHORT][settings.short_bytes :]
            last = text.popitem()
            text[EARLY] = cut_up(rest, _FRAGMENT)
            text.update([last])  # noise stays last
        halves = {name: (task.measure, task.report) for name, task in corpora.tasks.items()}
        digest = blake2b(digest_size=8)
        for each in [*text.values(), *(half for pair in halves.values() for half in pair)]:
            digest.update(each.tobytes())

        def sequences(content: Bytes) -> Sequences:
            return _OnDevice(content, length, settings.device)

        return cls(
            domains={name: sequences(each) for name, each in text.items()},
            steered={name: sequences(halves[name][0]) for name in corpora.steered},
            reported={name: sequences(report) for name, (_, report) in halves.items()},
            own=tuple(sorted({_OWN[name] for name in corpora.steered if _OWN.get(name) in text})),
            fingerprint=digest.hexdigest(),
        )

    @classmethod
    def built_in(cls, settings: StudySettings) -> Problem:
        """Gather the built-in corpora; a few seconds."""
        return cls.of(gather(domain_bytes=settings.main.domain_bytes, task_bytes=settings.main.task_bytes), settings)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the other tasks."""
        return tuple(name for name in self.reported if name not in self.steered)

    @property
    def natural(self) -> NDArray[np.float64]:
        """The share of each domain in all text, [m]."""
        sizes = np.array([len(text) for text in self.domains.values()], dtype=np.float64)
        return np.asarray(sizes / sizes.sum())


def cut_up(text: Bytes, length: int) -> Bytes:
    """Shuffle pieces of ``length`` bytes: they teach which bytes follow each other, and nothing more."""
    pieces = text[: len(text) // length * length].reshape(-1, length)
    return np.random.default_rng(23).permutation(pieces).ravel()


class _OnDevice(Sequences):
    def __init__(self, text: Bytes, length: int, device: str) -> None:
        super().__init__(text, length)
        self._moved = super().all().to(torch.device(device))

    def __getitem__(self, index: int) -> Tensor:
        return self._moved[index]

    def all(self) -> Tensor:
        return self._moved
