"""Transformers' Trainer that follows influence: ``python examples/huggingface_trainer.py``.

Callbacks do not get the batch, so a mixin wraps `training_step`, which does. A callback reports optimizer steps.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from corpus import Mixture, load, options, task_rows
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from tikmix_fast import InfluenceEngine, MixtureSampler, shifted_mask, tikmix_d


class FollowsInfluence:
    """Mix in before Trainer; batches need a key "domain", and ``args.remove_unused_columns=False``."""

    def __init__(self, *args: Any, tasks: dict[str, Any], every: int, stage: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tasks, self.every, self.stage = tasks, every, stage
        data: Mixture = self.train_dataset
        self.weights = {name: 1 / len(data.lengths) for name in data.lengths}
        self.sampler = MixtureSampler(data.lengths, self.weights, seed=self.args.data_seed or self.args.seed)
        self.run_: Any = None
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, *_: Any) -> MixtureSampler:
        return self.sampler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.run_ is None:  # the optimizer exists by now
            self.run_ = self._measure_in(model)
        domains = inputs.pop("domain")
        # Trainer divides the sum of token losses by the targets of all micro-batches of a step.
        normalizer = None if num_items_in_batch is None else float(num_items_in_batch)
        with self.run_.micro_batch(domains, mask=shifted_mask(inputs["labels"]), normalizer=normalizer):
            return super().training_step(model, inputs, num_items_in_batch)

    def _measure_in(self, model: Any) -> Any:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
        engine = InfluenceEngine(model, list(self.weights), list(self.tasks), optimizer=optimizer)

        def measure_tasks(step: int) -> None:
            for name, sequences in self.tasks.items():
                for half in task_rows(sequences, 4, seed=step).to(self.args.device).split(2):
                    with engine.task(name, mask=shifted_mask(half)):
                        model(input_ids=half, labels=half).loss.backward()

        return engine.in_run(every=self.every, tasks=measure_tasks, time_constant=10 * self.every)


class _Steps(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer.run_.step()
        if state.global_step % trainer.stage == 0 and state.global_step < state.max_steps:
            matrix = trainer.run_.matrix()
            result = tikmix_d(matrix, trainer.weights, diversity=0.3, floor=0.01, smoothing=0.3, confidence=0.5)
            trainer.weights = result.as_dict()
            trainer.sampler.set_weights(trainer.weights)
            print(f"step {state.global_step}: " + ", ".join(f"{k} {w:.3f}" for k, w in trainer.weights.items()))


class InfluenceTrainer(FollowsInfluence, Trainer):
    """Trainer whose mixture follows influence."""


def main(steps: int, every: int, stage: int) -> dict[str, float]:
    torch.manual_seed(0)
    data, tasks = load()
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_steps=stage,
            disable_tqdm=True,
        )
        trainer = InfluenceTrainer(
            GPT2LMHeadModel(config), arguments, train_dataset=data, tasks=tasks, every=every, stage=stage
        )
        trainer.train()
    print(trainer.run_.staleness())
    return trainer.weights


if __name__ == "__main__":
    main(**options(__doc__))
