"""Group Influence at a checkpoint, of local files on local files, that survives being killed."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tikmix_fast.checkpoints.adam_files import load_adam
from tikmix_fast.checkpoints.checkpoint import Checkpoint, check_files, load_checkpoint, load_tokenizer
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
from tikmix_fast.ops.common.projection import ProjectionKind
from tikmix_fast.tensor_files import digest, read_tensors, write_tensors

__all__ = ["CheckpointInfluence", "CheckpointSettings", "Progress"]

Progress = Callable[[str, int], None]
"""Called with what is being done, and how many sequences were done since the last call."""

RESUME = "resume.safetensors"
TOKENS = "tokens"
_FORMAT = "tikmix_fast.checkpoint_influence.2"
_LEAST = 8
"""Micro-batches in which every domain should be, for error bars and their tails."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is measured, and how.

    Attributes
    ----------
    model : str
        As for `load_checkpoint`.
    domains, tasks : mapping of str to str
        A file, a folder or a pattern by name, of text or of tokens; see `tikmix_fast.data.domain.open_domain`.
    tokenizer : str
        As for `load_tokenizer`.
    token_dtype : str or None
        The integers of .bin files without .idx, which do not tell; None: there are none.
    preconditioner : "identity", "adam", "ekfac" or "diagonal_fisher"
    optimizer : str or None
        A file that `save_adam` wrote, for "adam".
    damping : float
        Of "ekfac" and "diagonal_fisher".
    projection : int or None
        The side of random projections; None: exact.
    projection_kind : str
    tokens, task_tokens, fit_tokens : int
        At most per domain, per task, and of all domains together to fit "ekfac" or "diagonal_fisher".
    rel_error : float or None
        Stop measuring domains when `InfluenceMatrix.relative_error` of every task is at most this.
    length : int or None
        Targets per sequence; None: 512, or what the model can at most.
    batch : int
        Sequences per micro-batch, at most.
    task_splits : int
        As in `InfluenceEngine`.
    exclude : tuple of str
    dtype, device : str
        Of the weights.
    seed : int
        Of the choice of text, of projections, of sampled labels, and of random weights.
    save_every : int
        Micro-batches between two saves of the state.

    Raises
    ------
    ValueError
        If a number is out of its range, or options contradict each other.
    """

    model: str
    domains: Mapping[str, str]
    tasks: Mapping[str, str]
    tokenizer: str = "auto"
    token_dtype: str | None = None
    preconditioner: Literal["identity", "adam", "ekfac", "diagonal_fisher"] = "identity"
    optimizer: str | None = None
    damping: float = 0.1
    projection: int | None = None
    projection_kind: ProjectionKind = "countsketch"
    tokens: int = 65536
    task_tokens: int = 32768
    fit_tokens: int = 65536
    rel_error: float | None = None
    length: int | None = None
    batch: int = 8
    task_splits: int = 4
    exclude: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    seed: int = 0
    save_every: int = 20

    def __post_init__(self) -> None:
        least = {"tokens": 2, "task_tokens": 2, "fit_tokens": 2, "length": 2, "batch": 1, "task_splits": 1}
        for name, smallest in {**least, "seed": 0, "save_every": 1, "projection": 2}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {value}")
        if self.rel_error is not None and not self.rel_error > 0:
            raise ValueError(f"rel_error must be above 0; got {self.rel_error}")
        for what, named in (("domain", self.domains), ("task", self.tasks)):
            if not named:
                raise ValueError(f"{what} must be given at least once")
        if (self.preconditioner == "adam") != (self.optimizer is not None):
            raise ValueError(
                "preconditioner 'adam' and optimizer go together: give a file that "
                "tikmix_fast.checkpoints.adam_files.save_adam wrote"
            )
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be cpu or cuda; got {self.device!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not here: torch sees no GPU")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self) | {"exclude": list(self.exclude)}


class CheckpointInfluence:
    """One measurement: read everything, then `measure`.

    Parameters
    ----------
    settings : CheckpointSettings
    out : path
        An existing folder. The tokens of text are kept in ``tokens`` there, and the state while `measure` runs in
        ``resume.safetensors``.

    Attributes
    ----------
    settings : CheckpointSettings
        With what was left open decided.
    engine : InfluenceEngine
    warnings : list of str
        What whoever reads the matrix should know.
    seconds : dict of str to float
        Wall time by kind of work, interrupted runs included.
    resumed : int
        Micro-batches that were measured before an interruption.

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
        for what, named in (("domain", settings.domains), ("task", settings.tasks)):
            for name, path in named.items():
                with _naming(what, name):
                    find_files(path)
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
        """Sequences that `measure` goes through, at most; those measured before an interruption are not among them."""
        tasks = sum(len(rows) for rows in self._task_rows.values())
        domains = sum(len(rows) for _, rows in self._domain_batches[self.resumed :])
        return tasks + domains + sum(len(batch) for batch in self._fit_batches()) * len(self._fit_stages())

    def describe_memory(self) -> str:
        """Say how much memory the measurement will take, before it begins."""
        parameters = [*self.model.parameters()]
        weights = sum(p.nbytes for p in parameters)
        rows = max(len(rows) for _, rows in self._domain_batches)
        estimate = self.engine.memory_estimate(tokens=rows * self._length)
        total = 2 * weights + estimate.peak
        words = f"weights and their gradients {readable_size(2 * weights)}, influence {estimate}"
        if self._fit_stages() and isinstance(self.engine.preconditioner, EKFAC):
            factors = 2 * self.engine.preconditioner.factor_memory(self.engine.parameters())
            words += f", fitting {self.settings.preconditioner} {readable_size(factors)}"
            total += factors
        words = f"about {readable_size(total)} besides activations: {words}"
        free = free_memory(parameters[0].device)
        if free is not None and total > free[0]:
            self.warnings.append(
                f"it needs about {readable_size(total)}, and {readable_size(free[0])} are free: fewer task_splits or "
                "tasks, a projection, or a smaller batch need less"
            )
        return words

    def measure(self, progress: Progress = lambda what, amount: None) -> InfluenceMatrix:
        """Measure and return the matrix.

        Interrupted, also by kill -9, it goes on where the state was last saved, and the matrix is that of an
        uninterrupted run, bit for bit where torch computes the same bits again. The tasks, of which only gradients are
        needed, are measured again.

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
        """Delete the state: for when the matrix has been written."""
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
        """Return what the preconditioner is fitted on: text of all domains, in the batches that are measured."""
        if not self._fit_stages():
            return []
        batches = [rows for _, rows in self._domain_batches]
        wanted = max(self.settings.fit_tokens // (len(batches[0]) * self._length), 1)
        return batches[:wanted]

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
            # As many batches as splits, at least: each gives a gradient of its own.
            size = max(min(self.settings.batch, len(rows) // self.settings.task_splits), 1)
            for batch in rows.split(size):
                yield name, batch

    def _plan_domains(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the domain of every sequence and the sequences, one of every domain in turn while there are some."""
        rows = [*self._domain_rows.values()]
        order = [(j, r) for r in range(max(map(len, rows))) for j in range(len(rows)) if r < len(rows[j])]
        size = max(min(self.settings.batch, len(order) // _LEAST), 1)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield torch.tensor([j for j, _ in part]), torch.stack([rows[j][r] for j, r in part])

    def _draw(
        self, what: str, named: Mapping[str, str], budget: int, tokenizer: Tokenizer, vocabulary: int
    ) -> dict[str, Tensor]:
        """Return random sequences [rows, length + 1] of every domain or task, at most ``budget`` targets of each."""
        wanted = max(budget // self._length, 1)
        drawn = {}
        for name, path in named.items():
            # Of its own name, so that one domain more or less changes nothing for the others.
            random = np.random.default_rng((self.settings.seed, zlib.crc32(f"{what} {name}".encode())))
            with _naming(what, name):
                stated = any(file.suffix == ".bin" for file in find_files(path))  # other files tell their dtype
                text = open_domain(
                    path,
                    self._length,
                    tokenizer,
                    cache=self.out / TOKENS,
                    dtype=self.settings.token_dtype if stated else None,
                    vocabulary=vocabulary,
                )
                chosen = random.choice(len(text), min(wanted, len(text)), replace=False)
                drawn[name] = torch.stack([text[int(index)] for index in chosen])
            if len(chosen) < wanted:
                self.warnings.append(
                    f"{what} {name!r} has {len(chosen)} sequences of {self._length} tokens, not {wanted}: all of them "
                    "are measured"
                )
        return drawn

    # The state in a file.

    def _saving(self) -> Iterator[int]:
        """Yield the indices of micro-batches, and save between two of them.

        Before one is handed out, not after it was measured: by then `run_until` has asked whether it is needed.
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
        advice = "delete it to measure anew, or use another folder"
        try:
            tensors, content = read_tensors(path, _FORMAT)
        except ValueError as error:
            raise ValueError(f"{error}; {advice}") from None
        differ = [name for name, value in self._identity.items() if content["of"].get(name) != value]
        if differ:
            raise ValueError(
                f"{str(path)!r} is of an interrupted measurement that differs in {', '.join(differ)}: {advice}"
            )
        self.resumed, self.seconds = content["done"], content["seconds"]
        state: dict[str, Any] = content["engine"]
        projected = {name.removeprefix("projected/"): value for name, value in tensors.items()}
        return state | ({"projected": projected} if projected else {})

    def _identify(self) -> dict[str, str]:
        """Return what a state must share with this measurement to go on."""
        # Paths may have changed; what was read from them must not have.
        kept = {
            name: value
            for name, value in self.settings.to_dict().items()
            if name not in ("model", "tokenizer", "token_dtype", "domains", "tasks", "optimizer", "save_every")
        }
        identity = {name: json.dumps(value) for name, value in kept.items()}
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
def _naming(what: str, name: str) -> Iterator[None]:
    """Let errors begin with whose file it is."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{what} {name!r}: {error}") from None


@contextmanager
def _warnings_of(logger: str, into: list[str]) -> Iterator[None]:
    """Collect what is logged as a warning."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger(logger).addHandler(collector)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(collector)
