"""Measure Group Influence at a checkpoint from local files; a killed measurement can be continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tikmix_fast.checkpoints.adam_files import load_adam
from tikmix_fast.checkpoints.checkpoint import Checkpoint, check_files, load_checkpoint, load_tokenizer
from tikmix_fast.checkpoints.settings import CheckpointSettings
from tikmix_fast.data.domain import open_domain
from tikmix_fast.data.domain_files import find_files
from tikmix_fast.data.tokenizing import Tokenizer
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.influence.memory_estimate import readable_size
from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher
from tikmix_fast.influence.preconditioners.optimizer_state import read_adam
from tikmix_fast.influence.queries.offload import free_memory
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.tensor_files import digest, read_state, write_tensors

__all__ = ["CheckpointInfluence", "Progress"]

Progress = Callable[[str, int], None]
"""Called with the name of the current stage and the number of sequences finished since the last call."""

RESUME = "resume.safetensors"
TOKENS = "tokens"
_FORMAT = "tikmix_fast.checkpoint_influence"
_LEAST = 8
"""Micro-batches that should contain every domain: error bars and their tails need that many."""


class CheckpointInfluence:
    """One measurement: the constructor reads everything, `measure` measures.

    Parameters
    ----------
    settings : CheckpointSettings
    out : path
        An existing folder. It gets the tokens of text in ``tokens``, and the state of a running `measure` in
        ``resume.safetensors``.

    Attributes
    ----------
    settings : CheckpointSettings
        With ``length`` decided.
    engine : InfluenceEngine
    warnings : list of str
        What a reader of the matrix should know.
    seconds : dict of str to float
        Wall time by kind of work, earlier interrupted runs included.
    resumed : int
        Micro-batches that earlier, interrupted runs measured.

    Raises
    ------
    ValueError, TypeError, OSError, ModuleNotFoundError
        If a file is missing or unusable, if options do not fit the model, or if ``out`` holds the state of another
        measurement; the message says what to change.
    """

    def __init__(self, settings: CheckpointSettings, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        check_files(settings.model)
        tokenizer = load_tokenizer(settings.tokenizer, settings.model)
        for kind, paths in (("domain", settings.domains), ("task", settings.tasks)):
            for name, path in paths.items():
                with _naming(kind, name):
                    find_files(path)  # raises before the model takes its time to load
        checkpoint = load_checkpoint(settings.model, dtype=settings.dtype, device=settings.device, seed=settings.seed)
        self.settings = _with_length(settings, checkpoint)
        self.warnings = ["the weights are random: the numbers only show that it runs"] if checkpoint.random else []
        self._length = self.settings.length or 0
        self._domain_rows = self._draw("domain", settings.domains, settings.tokens, tokenizer, checkpoint.vocabulary)
        self._task_rows = self._draw("task", settings.tasks, settings.task_tokens, tokenizer, checkpoint.vocabulary)
        self.model = checkpoint.model
        optimizer = None if settings.optimizer is None else load_adam(settings.optimizer)
        self.engine = InfluenceEngine(
            self.model,
            list(settings.domains),
            list(settings.tasks),
            self._preconditioner(),
            optimizer,
            None
            if settings.projection is None
            else Projection(settings.projection, settings.projection_kind, settings.seed),
            settings.exclude,
            task_splits=settings.task_splits,
            batch_dim=0,
        )
        if optimizer is not None:
            read_adam(optimizer, self.engine.parameters())
        self._domain_batches = list(self._plan_domains())
        self.seconds: dict[str, float] = {}
        self.resumed = 0
        self._state = self._read_state()

    @property
    def work(self) -> int:
        """Most sequences that `measure` still has to process; earlier runs' sequences do not count."""
        tasks = sum(len(rows) for rows in self._task_rows.values())
        domains = sum(len(rows) for _, rows in self._domain_batches[self.resumed :])
        return tasks + domains + sum(len(batch) for batch in self._fit_batches()) * len(self._fit_stages())

    def describe_memory(self) -> str:
        """Describe the memory that the measurement will need; add a warning if that much is not free."""
        parameters = [*self.model.parameters()]
        weights = sum(p.nbytes for p in parameters)
        rows = max(len(rows) for _, rows in self._domain_batches)
        estimate = self.engine.memory_estimate(tokens=rows * self._length)
        total = 2 * weights + estimate.peak
        parts = f"weights and their gradients {readable_size(2 * weights)}, influence {estimate}"
        if self._fit_stages() and isinstance(self.engine.preconditioner, EKFAC):
            factors = 2 * self.engine.preconditioner.factor_memory(self.engine.parameters())
            parts += f", fitting {self.settings.preconditioner} {readable_size(factors)}"
            total += factors
        free = free_memory(parameters[0].device)
        if free is not None and total > free[0]:
            self.warnings.append(
                f"the measurement needs about {readable_size(total)}, and {readable_size(free[0])} are free: use fewer "
                "task_splits or tasks, a projection, or a smaller batch"
            )
        return f"about {readable_size(total)} besides activations: {parts}"

    def measure(self, progress: Progress = lambda what, amount: None) -> InfluenceMatrix:
        """Measure and return the matrix.

        After an interruption, even by kill -9, a new object with the same settings continues from the last saved state.
        Its matrix equals that of an uninterrupted run, bit for bit where torch reproduces its bits. Task gradients are
        not saved: the new run measures the tasks again.

        Raises
        ------
        UncapturedParameterError, ConservationError, FloatingPointError
            If the model cannot be measured.
        """
        with _warnings_of("tikmix_fast", self.warnings):
            self._fit(progress)
            if self._state is not None:
                self.engine.load_state_dict(self._state)
            with self._clock("tasks"):
                for name, batch in self._task_batches():
                    with self.engine.task(name):
                        self._loss(batch).backward()
                    progress("tasks", len(batch))
            batches = self._saving()
            if self.settings.rel_error is not None:
                batches = self.engine.run_until(batches, self.settings.rel_error, least=_LEAST)
            for index in batches:
                ids, batch = self._domain_batches[index]
                with self._clock("domains"), self.engine.domains(ids):
                    self._loss(batch).backward()
                self.model.zero_grad()
                progress("domains", len(batch))
            return self.engine.matrix()

    def finish(self) -> None:
        """Delete the state; call this after the matrix was written."""
        (self.out / RESUME).unlink(missing_ok=True)

    def _loss(self, batch: Tensor) -> Tensor:
        tokens = batch.to(self.settings.device)
        logits = self.model(input_ids=tokens[:, :-1]).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def _preconditioner(self) -> Any:
        kinds = {"ekfac": EKFAC, "diagonal_fisher": DiagonalFisher}
        name = self.settings.preconditioner
        return kinds[name](self.settings.damping, seed=self.settings.seed) if name in kinds else name

    def _fit_stages(self) -> tuple[Any, ...]:
        preconditioner = self.engine.preconditioner
        return preconditioner.stages if isinstance(preconditioner, EKFAC) else ()

    def _fit_batches(self) -> list[Tensor]:
        """Return the batches that fit the preconditioner: the first ones that are measured, from all domains."""
        if not self._fit_stages():
            return []
        batches = [rows for _, rows in self._domain_batches]
        count = max(self.settings.fit_tokens // (len(batches[0]) * self._length), 1)
        return batches[:count]

    def _fit(self, progress: Progress) -> None:
        if not self._fit_stages():
            return
        with self._clock("fitting"):
            for stage in self._fit_stages():
                for batch in self._fit_batches():
                    with self.engine.fisher(stage, sequences=len(batch)):
                        self._loss(batch).backward()
                    progress("fitting", len(batch))

    def _task_batches(self) -> Iterator[tuple[str, Tensor]]:
        for name, rows in self._task_rows.items():
            # Every split needs at least one batch.
            size = max(min(self.settings.batch, len(rows) // self.settings.task_splits), 1)
            for batch in rows.split(size):
                yield name, batch

    def _plan_domains(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the domains [rows] and sequences [rows, length + 1] of micro-batches; domains take turns."""
        rows = [*self._domain_rows.values()]
        order = [(j, r) for r in range(max(map(len, rows))) for j in range(len(rows)) if r < len(rows[j])]
        size = max(min(self.settings.batch, len(order) // _LEAST), 1)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield torch.tensor([j for j, _ in part]), torch.stack([rows[j][r] for j, r in part])

    def _draw(
        self, kind: str, paths: Mapping[str, str], budget: int, tokenizer: Tokenizer, vocabulary: int
    ) -> dict[str, Tensor]:
        """Return random sequences [rows, length + 1] of every domain or task, with at most ``budget`` targets each."""
        count = max(budget // self._length, 1)
        sequences = {}
        for name, path in paths.items():
            # The seed depends on the name alone: adding or removing a domain leaves the text of the others unchanged.
            random = np.random.default_rng((self.settings.seed, zlib.crc32(f"{kind} {name}".encode())))
            with _naming(kind, name):
                needs_dtype = any(file.suffix == ".bin" for file in find_files(path))
                text = open_domain(
                    path,
                    self._length,
                    tokenizer,
                    cache=self.out / TOKENS,
                    dtype=self.settings.token_dtype if needs_dtype else None,
                    vocabulary=vocabulary,
                )
                rows = random.choice(len(text), min(count, len(text)), replace=False)
                sequences[name] = torch.stack([text[int(row)] for row in rows])
            if len(rows) < count:
                self.warnings.append(
                    f"{kind} {name!r} has {len(rows)} sequences of {self._length} tokens, not {count}: all of them "
                    "are measured"
                )
        return sequences

    def _saving(self) -> Iterator[int]:
        """Yield the indices of micro-batches; save the state before a yield where it is due.

        Not right after a micro-batch was measured: `run_until` then still has to decide whether another is needed.
        """
        for index in range(self.resumed, len(self._domain_batches)):
            if index > self.resumed and index % self.settings.save_every == 0:
                self._write_state(index)
            yield index

    def _write_state(self, done: int) -> None:
        state = self.engine.state_dict(within_round=True)
        tensors = {f"projected/{name}": value for name, value in state.pop("projected", {}).items()}
        content = {"done": done, "of": self._identity, "seconds": self.seconds, "engine": state}
        write_tensors(self.out / RESUME, _FORMAT, tensors, content)

    def _read_state(self) -> dict[str, Any] | None:
        self._identity = self._identify()
        path = self.out / RESUME
        if not path.exists():
            return None
        tensors, content = read_state(path, _FORMAT, self._identity)
        self.resumed, self.seconds = content["done"], content["seconds"]
        state: dict[str, Any] = content["engine"]
        projected = {name.removeprefix("projected/"): value for name, value in tensors.items()}
        return state | ({"projected": projected} if projected else {})

    def _identify(self) -> dict[str, str]:
        """Return what a saved state must have in common with this measurement."""
        # Paths may differ; their content may not.
        identity = {
            name: json.dumps(value)
            for name, value in self.settings.to_dict().items()
            if name not in ("model", "tokenizer", "token_dtype", "domains", "tasks", "optimizer", "save_every")
        }
        identity["model"] = digest(dict(self.model.named_parameters()))
        identity["text"] = digest(
            {f"domain {name}": rows for name, rows in self._domain_rows.items()}
            | {f"task {name}": rows for name, rows in self._task_rows.items()}
        )
        if self.settings.optimizer is not None:
            identity["optimizer"] = hashlib.sha256(Path(self.settings.optimizer).read_bytes()).hexdigest()
        return identity

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        before = self.seconds.get(what, 0.0)
        try:
            yield
        finally:
            self.seconds[what] = before + time.perf_counter() - start


def _with_length(settings: CheckpointSettings, checkpoint: Checkpoint) -> CheckpointSettings:
    longest = checkpoint.longest
    if settings.length is None:
        return dataclasses.replace(settings, length=min(512, longest or 512))
    if longest is not None and settings.length > longest:
        raise ValueError(f"length must be at most {longest}, the model's positions; got {settings.length}")
    return settings


@contextmanager
def _naming(kind: str, name: str) -> Iterator[None]:
    """Prefix errors with the domain or task whose file caused them."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{kind} {name!r}: {error}") from None


@contextmanager
def _warnings_of(logger: str, into: list[str]) -> Iterator[None]:
    """Append the warnings of a logger to a list."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger(logger).addHandler(collector)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(collector)
