"""The fit of EK-FAC, ours and kronfluence's, on the same model and data: time in turn, memory in fresh processes."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.demo.gpt import GPT, GPTSettings
from tikmix_fast.influence.preconditioners.ekfac import EKFAC

__all__ = ["FitCase", "measure_fit"]

OURS, THEIRS, PASSES = "tikmix-fast", "kronfluence", "forward and backward alone, twice"


@dataclass(frozen=True)
class FitCase:
    """The model and data of a fit: a byte-level GPT on random sequences.

    Attributes
    ----------
    layers, width, length : int
        Size of the model.
    sequences, batch : int
        Number of sequences, and sequences per batch.
    tasks : int
        Ours is then applied to this many gradients; kronfluence's application to its queries does not count.
    """

    layers: int = 2
    width: int = 384
    length: int = 128
    sequences: int = 48
    batch: int = 8
    tasks: int = 9


TINY = FitCase(layers=1, width=16, length=8, sequences=4, batch=2, tasks=2)


def measure_fit(case: FitCase, *, rounds: int = 3, weigh: bool = True) -> dict[str, Any]:
    """Time both fits in turn by CPU time, and measure their peak memory.

    Both make two passes over the data with labels sampled from the model, and find the eigenvectors of all factors and
    the eigenvalues in their basis. Both keep float32 factors. By its defaults, kronfluence decomposes in float64 and
    writes to disk. It covers linear layers; ours covers norms, biases and tables too.

    Parameters
    ----------
    case : FitCase
    rounds : int
        Timed rounds, after one that does not count.
    weigh : bool
        Whether to measure peak memory.

    Returns
    -------
    dict
        Plain JSON types: ``case``, ``versions``, ``rows`` with CPU seconds per round and their median, ``ratio`` (of
        the medians), and ``growth_bytes`` by method (the median of 3 processes).

    Raises
    ------
    ModuleNotFoundError
        If kronfluence is not installed.
    """
    runs = {name: prepare(case) for name, prepare in _METHODS.items()}
    timings = interleave(runs, rounds)
    rows = [
        {"method": name, "cpu_seconds": float(np.median(cpu)), "by_round": cpu.tolist()}
        for name, cpu in timings.cpu.items()
    ]
    growth = {}
    if weigh and memory.why_not() is None:
        for name in _METHODS:
            request = {"case": asdict(case), "method": name, "threads": torch.get_num_threads()}
            growth[name] = sorted(memory.in_fresh_process(__name__, request)["growth"] for _ in range(3))[1]
    return {
        "case": asdict(case),
        "versions": {THEIRS: version(THEIRS), "torch": torch.__version__},
        "rows": rows,
        "ratio": float(np.median(timings.cpu[OURS]) / np.median(timings.cpu[THEIRS])),
        "ratio_by_round": (timings.cpu[OURS] / timings.cpu[THEIRS]).tolist(),
        "growth_bytes": growth,
    }


def _model_and_data(case: FitCase) -> tuple[GPT, Tensor]:
    data = torch.randint(256, (case.sequences, case.length + 1), generator=torch.Generator().manual_seed(0))
    return GPT(GPTSettings(case.layers, 4, case.width, case.length), seed=0).eval(), data


def _summed_loss(model: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def _passes(case: FitCase) -> Callable[[], object]:
    model, data = _model_and_data(case)

    def run() -> None:
        for batch in (*data.split(case.batch), *data.split(case.batch)):
            _summed_loss(model, batch).backward()
        model.zero_grad()

    return run


def _ours(case: FitCase) -> Callable[[], object]:
    model, data = _model_and_data(case)
    parameters = dict(model.named_parameters())

    def run() -> None:
        fitted = EKFAC().fit(model, data.split(case.batch), _summed_loss)
        fitted.prepare(parameters, None)
        for name, parameter in parameters.items():
            fitted.apply(name, torch.ones(case.tasks, *parameter.shape))

    return run


def _theirs(case: FitCase) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer_module = import_module("kronfluence.analyzer")
        arguments = import_module("kronfluence.arguments").FactorArguments(strategy="ekfac")
        task_class = import_module("kronfluence.task").Task

    class Task(task_class):  # type: ignore[misc, valid-type]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            logits = model(batch[0][:, :-1]).flatten(0, 1)
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
                return F.cross_entropy(logits, labels, reduction="sum")
            return F.cross_entropy(logits, batch[0][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return _summed_loss(model, batch[0])

    model, data = _model_and_data(case)
    wrapped = analyzer_module.prepare_model(model, Task())

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analyzer_module.Analyzer(
                "fit", wrapped, Task(), cpu=True, output_dir=folder, disable_tqdm=True
            ).fit_all_factors(
                "factors", TensorDataset(data), per_device_batch_size=case.batch, factor_args=arguments
            )  # fmt: skip

    return run


_METHODS: dict[str, Callable[[FitCase], Callable[[], object]]] = {PASSES: _passes, OURS: _ours, THEIRS: _theirs}


def _weigh_one(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak growth of one fit, after a tiny one has warmed up the libraries."""
    torch.set_num_threads(request["threads"])
    prepare = _METHODS[request["method"]]
    prepare(TINY)()
    return memory.peak_growth(prepare(FitCase(**request["case"])))


if __name__ == "__main__":
    print(json.dumps(_weigh_one(json.load(sys.stdin))))
