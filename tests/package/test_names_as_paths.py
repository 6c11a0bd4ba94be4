"""Names that are paths: nothing is written outside the output folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tikmix_fast.cli.app import app
from tikmix_fast.cli.demo import _write
from tikmix_fast.demo.corpora import Corpora, Task
from tikmix_fast.demo.demonstration import demonstrate
from tikmix_fast.demo.gpt import GPTSettings
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.demo.state import DemoState


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_domains_and_tasks_of_the_demonstration(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 600).astype(np.uint8)
    names = ("../outside", "/absolute", "..", "a/../../b")
    corpora = Corpora(dict.fromkeys(names, text), dict.fromkeys(names, Task(True, text, text)), {}, {})
    small = GPTSettings(layers=1, heads=1, width=8, length=16)
    settings = DemoSettings(
        steps=2, stages=2, batch=1, model=small, task_batches=2, domain_batches=2, task_splits=2, warm_up=1
    )
    out = tmp_path / "out"
    out.mkdir()
    state = DemoState(out / "resume.safetensors", settings, corpora, every=1)
    _write(demonstrate(settings, corpora, state=state), out)
    expected = {"results.json", "influence.json", "influence.png", "mixture.png", "loss.png", "resume.safetensors"}
    assert everything_in(tmp_path) == {f"out/{name}" for name in expected}
    assert not Path("/absolute").exists()


def test_domains_and_tasks_of_the_influence_command(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("some words that stand for a domain and for a task. " * 20)
    before = everything_in(tmp_path)
    words = ["influence", "--model", str(tmp_path / "config.json"), "--tokenizer", "bytes", "--out"]
    words += [str(tmp_path / "out"), "--length", "16", "--tokens", "256", "--task-tokens", "256"]
    for name in ("../outside", str(tmp_path / "absolute"), ".."):
        words += ["--domain", f"{name}={tmp_path / 'text.txt'}", "--task", f"{name}={tmp_path / 'text.txt'}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert all(name.startswith("out/") for name in everything_in(tmp_path) - before)
    assert "out/influence.json" in everything_in(tmp_path)
    report = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "out" / "page.html")])
    assert report.exit_code == 0, report.output
    assert all(name.startswith("out/") for name in everything_in(tmp_path) - before)


@pytest.mark.parametrize("name", ["../escape.safetensors", "/etc/passwd"])
def test_a_checkpoint_whose_index_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    from tikmix_fast.checkpoints.checkpoint import load_checkpoint

    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "escape.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "part.safetensors")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="cannot be used"):
        load_checkpoint(folder)
