"""A Lightning callback that follows influence: ``python examples/lightning_callback.py``.

With automatic optimization, forward and backward run inside the optimizer's closure, between two hooks of a callback.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning
import torch
from corpus import load, options, task_rows
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from tikmix_fast import InfluenceEngine, MixtureSampler, shifted_mask, tikmix_d


class FollowsInfluence(lightning.Callback):
    """Measure in the training steps, and move the sampler's weights after every stage."""

    def __init__(self, tasks: dict[str, Any], sampler: MixtureSampler, domains: list[str], every: int, stage: int):
        self.tasks, self.sampler, self.every, self.stage = tasks, sampler, every, stage
        self.weights = dict.fromkeys(domains, 1 / len(domains))
        self.run: Any = None
        self._open = ExitStack()
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine = InfluenceEngine(pl_module, list(self.weights), list(self.tasks), optimizer=trainer.optimizers[0])

        def measure_tasks(step: int) -> None:
            for name, sequences in self.tasks.items():
                for half in task_rows(sequences, 4, seed=step).to(pl_module.device).split(2):
                    with engine.task(name, mask=shifted_mask(half)):
                        pl_module.loss(half).backward()

        self.run = engine.in_run(every=self.every, tasks=measure_tasks, time_constant=10 * self.every)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        mask = shifted_mask(batch["labels"])
        parts = trainer.accumulate_grad_batches  # Lightning divides the mean loss by this
        self._open.enter_context(self.run.micro_batch(batch["domain"], mask, normalizer=float(mask.sum()) * parts))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._open.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._steps:
            return  # the gradients still accumulate
        self._steps = trainer.global_step
        self.run.step()
        if self._steps % self.stage == 0 and self._steps < trainer.max_steps:
            result = tikmix_d(self.run.matrix(), self.weights, diversity=0.3, floor=0.01, smoothing=0.3, confidence=0.5)
            self.weights = result.as_dict()
            self.sampler.set_weights(self.weights)
            print(f"step {self._steps}: " + ", ".join(f"{k} {w:.3f}" for k, w in self.weights.items()))


class Model(lightning.LightningModule):
    """A small GPT-2 on bytes."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(config)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.loss(batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int, every: int, stage: int) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    data, tasks = load()
    domains = list(data.lengths)
    sampler = MixtureSampler(data.lengths, dict.fromkeys(domains, 1 / len(domains)), seed=0)
    follows = FollowsInfluence(tasks, sampler, domains, every, stage)
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[follows],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Model(), DataLoader(data, batch_size=8, sampler=sampler))
    print(follows.run.staleness())
    return follows.weights


if __name__ == "__main__":
    main(**options(__doc__))
