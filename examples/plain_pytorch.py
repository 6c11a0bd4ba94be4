"""A training loop of your own that follows influence: ``python examples/plain_pytorch.py``."""

from __future__ import annotations

import torch
from corpus import load, options, task_rows
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from tikmix_fast import InfluenceEngine, MixtureSampler, shifted_mask, tikmix_d


def main(steps: int, every: int, stage: int) -> dict[str, float]:
    torch.manual_seed(0)
    data, tasks = load()
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights = {name: 1 / len(data.lengths) for name in data.lengths}
    sampler = MixtureSampler(data.lengths, weights, seed=0, num_samples=16 * steps)

    engine = InfluenceEngine(model, domains=list(data.lengths), tasks=list(tasks), optimizer=optimizer)

    def measure_tasks(step: int) -> None:  # small passes at a measured step; they leave p.grad alone
        for name, sequences in tasks.items():
            for half in task_rows(sequences, 4, seed=step).split(2):
                with engine.task(name, mask=shifted_mask(half)):
                    model(input_ids=half, labels=half).loss.backward()

    run = engine.in_run(every=every, tasks=measure_tasks, time_constant=10 * every)
    for step, batch in enumerate(DataLoader(data, batch_size=16, sampler=sampler), start=1):
        with run.micro_batch(batch["domain"], mask=shifted_mask(batch["labels"])):
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        if step % stage == 0 and step < steps:
            result = tikmix_d(run.matrix(), weights, diversity=0.3, floor=0.01, smoothing=0.3, confidence=0.5)
            weights = result.as_dict()
            sampler.set_weights(weights)
            print(f"step {step}, loss {loss.item():.2f}: " + ", ".join(f"{k} {w:.3f}" for k, w in weights.items()))
    print(run.staleness())
    return weights


if __name__ == "__main__":
    main(**options(__doc__))
