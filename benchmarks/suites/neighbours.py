"""Neighbouring libraries that measure all influence too, where they are installed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikmix_fast.benchmarking.autograd_truth import summed_loss
from tikmix_fast.benchmarking.measurement import Measurement, MeasurementMethod
from tikmix_fast.demo.gpt import GPT

__all__ = ["find_neighbours"]

_WITHOUT_RUNNER = {
    "bergson": "it needs a model and data sets in Hugging Face's formats",
    "kronfluence": "it takes one group per call and returns results through the disk",
}


def find_neighbours() -> tuple[dict[str, MeasurementMethod], dict[str, str]]:
    """Return the libraries that run here as methods, and why the others do not run.

    Each library works in its own way. opacus gives a gradient per example; the method sums them per group. captum gives
    a score per example over the weights of all linear layers; the method sums them per domain.
    """
    prepare = {"opacus, grad_sample": (_opacus, "opacus"), "captum, TracInCP": (_captum, "captum")}
    methods, missing = {}, dict(_WITHOUT_RUNNER)
    for name, (method, package) in prepare.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(package)
        except ImportError as error:
            missing[package] = str(error)
        else:
            covers = _in_linear if package == "captum" else (lambda parameter: True)
            methods[name] = MeasurementMethod(_quietly(method), covers)
    return methods, missing


class _PositionsPerSequence(GPT):
    """The same model, but it looks up positions for every sequence: gradients per example need that."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1]).expand_as(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _copy(model: GPT) -> GPT:
    twin = copy.deepcopy(model)
    twin.__class__ = _PositionsPerSequence
    return twin


def _quietly(
    prepare: Callable[[Measurement], Callable[[], Tensor]],
) -> Callable[[Measurement], Callable[[], Tensor]]:
    """Hide the libraries' warnings: they concern other uses."""

    def prepare_quietly(data: Measurement) -> Callable[[], Tensor]:
        def run_quietly() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return run()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = prepare(data)
        return run_quietly

    return prepare_quietly


def _opacus(data: Measurement) -> Callable[[], Tensor]:
    model = import_module("opacus.grad_sample").GradSampleModule(_copy(data.model), loss_reduction="sum")
    parameters = list(model.parameters())

    def add(sums: Sequence[Tensor], batch: Tensor, ids: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = parameter.grad_sample = None
        summed_loss(model, batch).backward()
        for total, parameter in zip(sums, parameters, strict=True):
            total.index_add_(0, ids, parameter.grad_sample)

    def run() -> Tensor:
        tasks, domains = (
            [p.new_zeros(count, *p.shape) for p in parameters] for count in (data.case.tasks, data.case.domains)
        )
        for task, batches in enumerate(data.tasks):
            for batch in batches:
                add(tasks, batch, torch.full((len(batch),), task))
        for batch, ids in data.mixed:
            add(domains, batch, ids)
        values = torch.stack([a.flatten(1) @ b.flatten(1).T for a, b in zip(tasks, domains, strict=True)])
        return _per_token(values.sum(0), data)

    return run


class _SummedLoss(nn.Module):
    reduction = "sum"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _captum(data: Measurement) -> Callable[[], Tensor]:
    trace = import_module("captum.influence").TracInCP
    model = _copy(data.model)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sequences = torch.cat([batch for batch, _ in data.mixed])
    ids = torch.cat([ids for _, ids in data.mixed])
    dataset = torch.utils.data.TensorDataset(sequences[:, :-1], sequences[:, 1:])

    def run() -> Tensor:
        tracing = trace(
            model, dataset, ["these weights"], checkpoints_load_func=lambda model, path: 1.0, layers=layers,
            loss_fn=_SummedLoss(), batch_size=data.case.batch, sample_wise_grads_per_batch=True,
        )  # fmt: skip
        rows = []
        for batches in data.tasks:
            task = torch.cat(batches)
            rows.append(tracing.influence((task[:, :-1], task[:, 1:]), aggregate=True).flatten())
        values = torch.zeros(data.case.tasks, data.case.domains).index_add_(1, ids, torch.stack(rows))
        return _per_token(values, data)

    return run


def _in_linear(parameter: str) -> bool:
    return "norm" not in parameter and not parameter.startswith(("bytes", "positions"))


def _per_token(values: Tensor, data: Measurement) -> Tensor:
    """Divide the inner products [n, m] of summed gradients by the target tokens of both sides."""
    tasks, domains = (
        torch.tensor([sum(batch[:, 1:].numel() for batch in batches) for batches in groups])
        for groups in (data.tasks, data.domains)
    )
    return values / tasks[:, None] / domains
