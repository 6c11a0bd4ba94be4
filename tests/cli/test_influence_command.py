"""``tikmix-fast influence``: the numbers against autograd, resuming after a kill, and mistakes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

from tikmix_fast import InfluenceEngine, InfluenceMatrix
from tikmix_fast.checkpoints import checkpoint_influence
from tikmix_fast.checkpoints.adam_files import load_adam, save_adam
from tikmix_fast.checkpoints.checkpoint import load_checkpoint
from tikmix_fast.checkpoints.checkpoint_influence import CheckpointInfluence
from tikmix_fast.checkpoints.settings import CheckpointSettings
from tikmix_fast.cli.app import app
from tikmix_fast.influence.passes.conservation import ConservationError
from tikmix_fast.tensor_files import digest, read_tensors, write_tensors

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = 300
LETTERS = {"words": "abcde fgh", "digits": "0123456789\n", "signs": "+-*/()= "}


def run(*arguments: str | Path) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of transformers, on import
        return CliRunner().invoke(app, ["influence", *map(str, arguments)])


def mistake(result: Result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.strip().splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    generator = random.Random(0)
    for name, letters in LETTERS.items():
        (folder / f"{name}.txt").write_text("".join(generator.choices(letters, k=4000)))
    lines = [{"text": "".join(generator.choices(LETTERS["words"], k=70)), "id": k} for k in range(40)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """Folders "gpt2" and "llama" with a model and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train([str(texts / f"{name}.txt") for name in LETTERS], trainer)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(1)
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, **shared)
    llama = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **shared,
    )  # fmt: skip
    for name, model in (
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)),
        ("llama", transformers.LlamaForCausalLM(llama)),
    ):
        for parameter in model.parameters():  # norms and biases too, so that nothing is 0 or 1
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


def words_for(texts: Path, out: Path, **more: Any) -> list[str | Path]:
    """The usual arguments but the model."""
    options: dict[str, Any] = {"length": 16, "tokens": 160, "task_tokens": 128, "batch": 4, **more}
    words: list[str | Path] = ["--out", out]
    for name in LETTERS:
        words += ["--domain", f"{name}={texts / name}.txt"]
    words += ["--task", f"numbers={texts / 'digits.txt'}", "--task", f"lines={texts / 'lines.jsonl'}"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def settings_for(texts: Path, model: Path, **more: Any) -> CheckpointSettings:
    return CheckpointSettings(
        model=str(model),
        domains={name: str(texts / f"{name}.txt") for name in LETTERS},
        tasks={"numbers": str(texts / "digits.txt"), "lines": str(texts / "lines.jsonl")},
        **{"length": 16, "tokens": 160, "task_tokens": 128, "batch": 4, **more},
    )


def token_rows(measurement: CheckpointInfluence) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return measurement._domain_rows, measurement._task_rows


def mean_gradient(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """By autograd alone, example by example, with the loss that transformers itself computes."""
    total: torch.Tensor | int = 0
    for row in rows:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        total = total + torch.cat([p.grad.flatten() for p in model.parameters()])
    return total / len(rows)


# numbers


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_matrix_is_that_of_per_example_autograd(kind: str, models: Path, texts: Path, tmp_path: Path) -> None:
    result = run("--model", models / kind, *words_for(texts, tmp_path), "--json")
    assert result.exit_code == 0, result.output
    matrix = InfluenceMatrix.load(tmp_path / "influence.json")
    domains, tasks = token_rows(CheckpointInfluence(settings_for(texts, models / kind), tmp_path))
    auto = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}[kind]
    model = auto.from_pretrained(models / kind, local_files_only=True).double().eval()
    sides = [[mean_gradient(model, rows) for rows in side.values()] for side in (tasks, domains)]
    tasks_side, domains_side = map(torch.stack, sides)
    lengths = tasks_side.norm(dim=1)[:, None] * domains_side.norm(dim=1)
    difference = (torch.from_numpy(matrix.values) - tasks_side @ domains_side.T).abs() / lengths
    assert float(difference.max()) < 1e-6
    assert matrix.tokens.tolist() == [160.0] * 3
    assert (matrix.tasks, matrix.domains) == (("numbers", "lines"), tuple(LETTERS))
    printed = json.loads(result.stdout)
    assert printed["matrix"] == matrix.to_dict()
    assert printed["significant"] == matrix.significant(correction="bh").tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_matrix_is_that_of_the_engine(kind: str, models: Path, texts: Path, tmp_path: Path) -> None:
    assert run("--model", models / kind, *words_for(texts, tmp_path, task_splits=2)).exit_code == 0
    matrix = InfluenceMatrix.load(tmp_path / "influence.json")
    settings = settings_for(texts, models / kind, task_splits=2)
    measurement = CheckpointInfluence(settings, tmp_path)
    domains, tasks = token_rows(measurement)
    model = load_checkpoint(models / kind).model
    engine = InfluenceEngine(model, list(domains), list(tasks), "identity", task_splits=2)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=rows[:, :-1]).logits.transpose(1, 2), rows[:, 1:])

    for name, rows in tasks.items():
        for part in rows.split(4):
            with engine.task(name):
                loss(part).backward()
    for name, rows in domains.items():
        with engine.domains(name):
            loss(rows).backward()
    scale = np.abs(matrix.values).max()
    np.testing.assert_allclose(matrix.values, engine.matrix().values, rtol=0, atol=1e-5 * scale)


def test_adam_is_read_from_safetensors(models: Path, texts: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(models / "gpt2")
    model = checkpoint.model
    slow = [p for name, p in model.named_parameters() if "wte" in name]
    fast = [p for name, p in model.named_parameters() if "wte" not in name]
    optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-4}, {"params": fast}], lr=1e-3, betas=(0.9, 0.95))
    for seed in range(3):
        rows = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "tokenizer.json").write_bytes((models / "gpt2" / "tokenizer.json").read_bytes())
    save_adam(tmp_path / "adam.safetensors", optimizer, model)
    words = words_for(texts, tmp_path / "out", optimizer=tmp_path / "adam.safetensors")
    assert run("--model", tmp_path / "trained", *words).exit_code == 0
    matrix = InfluenceMatrix.load(tmp_path / "out" / "influence.json")
    assert (matrix.settings["preconditioner"], matrix.settings["reference_lr"]) == ("adam", 1e-3)
    settings = settings_for(texts, tmp_path / "trained")
    domains, tasks = token_rows(CheckpointInfluence(settings, tmp_path))
    scale = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v = (state["exp_avg_sq"].double() / (1 - 0.95**3)).sqrt() + group["eps"]
            scale.append((group["lr"] / 1e-3 / v).flatten())
    by_parameter = dict(zip(map(id, slow + fast), scale, strict=True))
    p_of = torch.cat([by_parameter[id(p)] for p in model.parameters()])
    double = model.double()
    task, domain = mean_gradient(double, tasks["numbers"]), mean_gradient(double, domains["signs"])
    expected = float((p_of * task * domain).sum())
    length = float((p_of * task).norm() * domain.norm())
    assert abs(matrix["numbers", "signs"] - expected) < 1e-5 * length


@pytest.mark.parametrize("preconditioner", ["ekfac", "diagonal_fisher"])
def test_the_fisher_matrix_is_fitted_first(preconditioner: str, models: Path, texts: Path, tmp_path: Path) -> None:
    words = words_for(texts, tmp_path, preconditioner=preconditioner, fit_tokens=100, damping=0.3)
    assert run("--model", models / "llama", *words).exit_code == 0
    matrix = InfluenceMatrix.load(tmp_path / "influence.json")
    assert matrix.settings["preconditioner"] == preconditioner
    measurement = CheckpointInfluence(
        settings_for(texts, models / "llama", preconditioner=preconditioner, fit_tokens=100, damping=0.3), tmp_path
    )
    fisher = measurement.engine.preconditioner
    assert measurement.measure().to_dict() == matrix.to_dict()
    assert fisher.tokens == sum(len(batch) for batch in measurement._fit_batches()) * 16
    assert 0 < fisher.tokens <= 128


def test_a_configuration_is_measured_with_random_weights_and_bytes(models: Path, texts: Path, tmp_path: Path) -> None:
    words = words_for(texts, tmp_path, tokenizer="bytes", seed=3, projection=16)
    result = run("--model", models / "gpt2" / "config.json", *words)
    assert result.exit_code == 0
    assert "weights are random" in result.stderr
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["seed"], settings["projection"], settings["tokenizer"]) == (3, 16, "bytes")
    assert InfluenceMatrix.load(tmp_path / "influence.json").settings["projection"]["dim"] == 16
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == settings
    domains, _ = token_rows(CheckpointInfluence(settings_for(texts, models / "gpt2", tokenizer="bytes"), tmp_path))
    text = (texts / "digits.txt").read_bytes() + b"\n\n"
    assert all(bytes(row.tolist()) in text for row in domains["digits"])


def test_token_files_are_measured_as_their_dtype_says(models: Path, texts: Path, tmp_path: Path) -> None:
    tokens = {name: np.random.default_rng(seed).integers(VOCABULARY, size=300) for seed, name in enumerate("abt")}
    for name, values in tokens.items():
        np.save(tmp_path / f"{name}.npy", values)
        values.astype("<u2").tofile(tmp_path / f"{name}.bin")
    words = ["--model", models / "gpt2", "--length", 16, "--domain", f"b={tmp_path / 'b.npy'}"]
    # A .npy tells its own dtype, whatever is said of the .bin files.
    stated = [*words, "--domain", f"a={tmp_path / 'a.bin'}", "--task", f"t={tmp_path / 't.bin'}"]
    assert run(*stated, "--token-dtype", "uint16", "--out", tmp_path / "stated").exit_code == 0
    own = [*words, "--domain", f"a={tmp_path / 'a.npy'}", "--task", f"t={tmp_path / 't.npy'}"]
    assert run(*own, "--out", tmp_path / "told").exit_code == 0
    matrices = [InfluenceMatrix.load(tmp_path / each / "influence.json") for each in ("stated", "told")]
    assert matrices[0].to_dict() == matrices[1].to_dict()
    assert json.loads((tmp_path / "stated" / "settings.json").read_text())["token_dtype"] == "uint16"
    assert "a.bin: dtype must be stated (--token-dtype)" in mistake(run(*stated, "--out", tmp_path / "unstated"))
    wrong = mistake(run(*stated, "--token-dtype", "uint32", "--out", tmp_path / "wrong"))
    assert "must be from 0 to 299" in wrong


def test_measuring_stops_when_the_errors_are_small_enough(models: Path, texts: Path, tmp_path: Path) -> None:
    words = words_for(texts, tmp_path, tokens=2000, rel_error=5.0)
    assert run("--model", models / "gpt2", *words).exit_code == 0
    stopped = InfluenceMatrix.load(tmp_path / "influence.json")
    assert (stopped.relative_error() <= 5.0).all()
    assert stopped.microbatches.min() == 8
    result = run("--model", models / "gpt2", *words_for(texts, tmp_path, rel_error=1e-9))
    assert result.exit_code == 0
    assert "before the relative error" in result.stderr  # out of text, and says so


# resume


def killed_after(microbatches: int, arguments: list[str]) -> None:
    """Run the command in a process of its own that is killed once so many micro-batches were saved."""
    script = f"""
import os, signal, sys
from tikmix_fast.checkpoints import checkpoint_influence as module
write = module.CheckpointInfluence._write_state
def write_and_die(self, done):
    write(self, done)
    if done >= {microbatches}:
        os.kill(os.getpid(), signal.SIGKILL)
module.CheckpointInfluence._write_state = write_and_die
from tikmix_fast.cli import main
sys.argv[1:] = {arguments!r}
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_ends_with_the_same_matrix(models: Path, texts: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"save_every": 2, "threads": 1, "projection": 16, "task_splits": 2}
    assert run("--model", models / "gpt2", *words_for(texts, whole, **options)).exit_code == 0
    arguments = ["--model", models / "gpt2", *words_for(texts, killed, **options)]
    killed_after(4, ["influence", *map(str, arguments)])
    assert (killed / "resume.safetensors").exists()
    assert not (killed / "influence.json").exists()
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "continuing after 4 micro-batches" in result.stderr
    assert (killed / "influence.json").read_bytes() == (whole / "influence.json").read_bytes()
    assert not (killed / "resume.safetensors").exists()


@pytest.mark.parametrize(
    "more",
    [{}, {"rel_error": 0.8, "tokens": 800}, {"preconditioner": "ekfac", "fit_tokens": 100}, {"projection": 16}],
    ids=["exact", "rel-error", "ekfac", "projected"],
)
def test_a_run_interrupted_at_every_save_ends_with_the_same_matrix(
    more: dict[str, Any], models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(texts, models / "gpt2", save_every=3, **more)
    whole = CheckpointInfluence(settings, tmp_path).measure()
    (tmp_path / "resume.safetensors").unlink()
    write = CheckpointInfluence._write_state

    def write_and_stop(self: CheckpointInfluence, done: int) -> None:
        write(self, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointInfluence, "_write_state", write_and_stop)
    interruptions = 0
    while True:
        measurement = CheckpointInfluence(settings, tmp_path)
        assert measurement.resumed == 3 * interruptions
        try:
            matrix = measurement.measure()
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions >= 2
    assert matrix.to_dict() == whole.to_dict()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_matrix(models: Path, texts: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"save_every": 1, "threads": 1, "tokens": 1000}
    assert run("--model", models / "gpt2", *words_for(texts, whole, **options)).exit_code == 0
    arguments = [str(each) for each in ("--model", models / "gpt2", *words_for(texts, killed, **options))]
    script = f"import sys; from tikmix_fast.cli import main; sys.argv[1:] = {['influence', *arguments]!r}; main()"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (killed / "resume.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not list(killed.glob("influence.json"))
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "continuing after" in result.stderr
    assert (killed / "influence.json").read_bytes() == (whole / "influence.json").read_bytes()


@pytest.fixture
def interrupted(models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the state of a run that was interrupted."""
    write = CheckpointInfluence._write_state

    def write_and_stop(self: CheckpointInfluence, done: int) -> None:
        write(self, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointInfluence, "_write_state", write_and_stop)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        CheckpointInfluence(settings_for(texts, models / "gpt2", save_every=2), out).measure()
    monkeypatch.undo()
    return out


@pytest.mark.parametrize(
    ("more", "kind", "differs"),
    [
        ({"seed": 1}, "gpt2", "seed"),
        ({"batch": 2}, "gpt2", "batch"),
        ({}, "llama", "model"),
        ({"tokens": 100}, "gpt2", "text"),
    ],
)
def test_the_state_of_another_measurement_is_refused(
    more: dict[str, Any], kind: str, differs: str, interrupted: Path, models: Path, texts: Path
) -> None:
    message = mistake(run("--model", models / kind, *words_for(texts, interrupted, **more)))
    assert "resume.safetensors" in message
    assert differs in message.split("run with other")[1]
    assert (interrupted / "resume.safetensors").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_state_is_refused(damage: str, interrupted: Path, models: Path, texts: Path) -> None:
    path = interrupted / "resume.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-100] ^= 1
    else:
        content = bytearray((models / "gpt2" / "model.safetensors").read_bytes())
    path.write_bytes(content)
    message = mistake(run("--model", models / "gpt2", *words_for(texts, interrupted)))
    assert "resume.safetensors" in message
    assert "delete it" in message


# mistakes


def test_mistakes_in_names_and_paths_are_told_in_one_line(models: Path, texts: Path, tmp_path: Path) -> None:
    good = ["--model", models / "gpt2", "--out", tmp_path / "out"]
    domain, task = ["--domain", f"words={texts / 'words.txt'}"], ["--task", f"lines={texts / 'lines.jsonl'}"]
    empty, binary, broken = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "broken.jsonl"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    broken.write_text('{"text": "a"}\n{"title": "b"}\n')
    for words, message in [
        ([*good, *domain, "--task", "lines"], "task must be NAME=PATH; got 'lines'"),
        ([*good, *domain, *task, "--domain", f"={texts}"], "domain must be NAME=PATH"),
        ([*good, *domain, *domain, *task], "domain must have every name once; got 'words' twice"),
        ([*good, *task, "--domain", "web=no/file.txt"], "domain 'web': no/file.txt: no such file"),
        ([*good, *task, "--domain", f"web={empty}"], "domain 'web'"),
        ([*good, *domain, "--task", f"qa={binary}"], "must be UTF-8"),
        ([*good, *domain, "--task", f"qa={broken}"], "broken.jsonl:2"),
        ([*good, *domain, *task, "--length", 100], "length must be at most 64"),
        ([*good, *domain, *task, "--length", 1], "length must be an int of at least 2; got 1"),
        ([*good, *domain, *task, "--rel-error", 0], "rel_error must be above 0"),
        ([*good, *domain, *task, "--device", "tpu9"], "device"),
        ([*good, *domain, *task, "--exclude", "nothing*"], "nothing*"),
        ([*good, *domain, *task, "--projection", 5], "dim must be"),
        ([*good, *domain, *task, "--preconditioner", "adam"], "optimizer"),
        ([*good, *domain, *task, "--optimizer", tmp_path / "no.safetensors"], "no.safetensors"),
        ([*good, *domain, *task, "--optimizer", models / "gpt2" / "model.safetensors"], "save_adam"),
        ([*good, *domain, *task, "--tokenizer", tmp_path], "tokenizer must be"),
        (["--model", "gpt2-xl", *domain, *task, "--out", tmp_path], "nothing is downloaded"),
        (["--model", models / "gpt2" / "tokenizer.json", *domain, *task, "--out", tmp_path], "tokenizer.json"),
        (["--model", models / "gpt2", *domain, *task, "--out", empty], "out must be a folder"),
    ]:  # fmt: skip
        assert message in mistake(run(*words)), words


def broken_model(models: Path, folder: Path) -> Path:
    folder.mkdir()
    for each in (models / "gpt2").iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_models_that_cannot_be_measured_are_refused(models: Path, texts: Path, tmp_path: Path) -> None:
    weights = transformers.GPT2LMHeadModel.from_pretrained(models / "gpt2").state_dict()
    marker = tmp_path / "ran"
    folders = {
        name: broken_model(models, tmp_path / name)
        for name in ("pickled", "adapter", "quantised", "cut", "partial", "code", "encoder", "tokenless", "foreign")
    }
    (folders["pickled"] / "model.safetensors").unlink()
    torch.save(weights, folders["pickled"] / "pytorch_model.bin")
    (folders["adapter"] / "adapter_config.json").write_text("{}")
    change_config(folders["quantised"], quantization_config={"quant_method": "gptq", "bits": 4})
    cut = folders["cut"] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    from safetensors.torch import save_file

    part = {
        name: value.contiguous() for name, value in weights.items() if "h.1.mlp" not in name and "lm_head" not in name
    }
    save_file(part, folders["partial"] / "model.safetensors", {"format": "pt"})
    change_config(
        folders["code"], model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    )
    (folders["code"] / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(folders["encoder"], model_type="t5")
    (folders["tokenless"] / "tokenizer.json").unlink()
    change_config(folders["foreign"], vocab_size=200)
    for name, message in {
        "pickled": "pytorch_model.bin is a pickle",
        "adapter": "is an adapter",
        "quantised": "quantised",
        "cut": "cannot be used",
        "partial": "lacks the weights",
        "code": "cannot be used",
        "encoder": "'t5'",
        "tokenless": "tokenizer must be a folder with tokenizer.json or 'bytes'",
        "foreign": "has another shape of",
    }.items():
        assert message in mistake(run("--model", folders[name], *words_for(texts, tmp_path / "out"))), name
    assert not marker.exists()


def test_a_tokenizer_of_another_model_is_refused(models: Path, texts: Path, tmp_path: Path) -> None:
    small = tmp_path / "config.json"
    small.write_text((models / "gpt2" / "config.json").read_text())
    change_config(tmp_path, vocab_size=100)
    words = words_for(texts, tmp_path / "out", tokenizer=models / "llama")
    assert "another tokenizer" in mistake(run("--model", small, *words))


def test_a_model_that_cannot_be_captured_gives_no_result(
    models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: CheckpointInfluence, progress: Any) -> None:
        raise ConservationError("'wte' does not add up")

    monkeypatch.setattr(checkpoint_influence.CheckpointInfluence, "measure", refuse)
    result = run("--model", models / "gpt2", *words_for(texts, tmp_path))
    assert result.exit_code == 1
    assert "no result: 'wte' does not add up" in result.stderr


# parts


def test_text_is_drawn_without_replacement(models: Path, texts: Path, tmp_path: Path) -> None:
    text = (texts / "digits.txt").read_bytes() + b"\n\n"
    every = [text[start : start + 17] for start in range(0, len(text) - 16, 16)]
    drawn = {}
    for seed in (0, 0, 1):
        settings = settings_for(texts, models / "gpt2", tokenizer="bytes", tokens=480, seed=seed)
        domains, _ = token_rows(CheckpointInfluence(settings, tmp_path))
        rows = [bytes(row) for row in domains["digits"].tolist()]
        assert len(rows) == 30
        assert set(rows) <= set(every)
        assert len(set(rows)) == 30
        assert drawn.setdefault(seed, rows) == rows
    assert drawn[0] != drawn[1]


def test_documents_end_with_the_models_token(models: Path, texts: Path, tmp_path: Path) -> None:
    measurement = CheckpointInfluence(settings_for(texts, models / "llama", task_tokens=10**6), tmp_path)
    (tokens,) = {int((rows[:, 1:] == 0).sum()) for name, rows in token_rows(measurement)[1].items() if name == "lines"}
    assert 30 <= tokens <= 40  # of 40 lines, the last lie beyond the last whole sequence


def test_folders_patterns_and_token_files_are_read(models: Path, texts: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(200, dtype=np.uint16) % 100)
    words = ["--model", models / "gpt2", "--out", tmp_path / "out", "--length", 16, "--tokens", 64, "--task-tokens", 64]
    words += ["--domain", f"all={texts}", "--domain", f"some={texts}/[dw]*.txt"]
    words += ["--domain", f"tokens={tmp_path / 'tokens.npy'}", "--task", f"lines={texts / 'lines.jsonl'}"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert InfluenceMatrix.load(tmp_path / "out" / "influence.json").tokens.tolist() == [64.0] * 3


def test_one_more_domain_changes_nothing_for_the_others(models: Path, texts: Path, tmp_path: Path) -> None:
    both = settings_for(texts, models / "gpt2")
    one = CheckpointSettings(**{**both.__dict__, "domains": {"signs": both.domains["signs"]}})
    drawn = [token_rows(CheckpointInfluence(each, tmp_path))[0]["signs"] for each in (both, one)]
    assert torch.equal(*drawn)


def test_memory_is_told_before_and_too_little_of_it_is_a_warning(
    models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("--model", models / "gpt2", *words_for(texts, tmp_path))
    assert "memory: about" in result.stderr
    monkeypatch.setattr(checkpoint_influence, "free_memory", lambda device: (10, 10))
    measurement = CheckpointInfluence(settings_for(texts, models / "gpt2"), tmp_path)
    measurement.describe_memory()
    assert "fewer task_splits" in measurement.warnings[-1]


def test_short_text_is_measured_whole_and_said_so(models: Path, texts: Path, tmp_path: Path) -> None:
    result = run("--model", models / "gpt2", *words_for(texts, tmp_path, tokens=10**6))
    assert result.exit_code == 0
    assert "all of them are measured" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("damage", ["negative", "setting", "name"])
def test_a_damaged_file_of_moments_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "adam.safetensors"
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_adam(path, optimizer, model)
    assert digest({k: v["exp_avg_sq"] for k, v in load_adam(path)["state"].items()}) == digest(
        {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    )
    tensors, about = read_tensors(path, "tikmix_fast.adam")
    if damage == "negative":
        tensors["bias"][0] = -1
    elif damage == "setting":
        del about["bias"]["lr"]
    else:
        tensors["other"] = tensors.pop("bias")
    write_tensors(path, "tikmix_fast.adam", tensors, about)
    with pytest.raises(ValueError, match="save_adam"):
        load_adam(path)
