"""EK-FAC against that of kronfluence (Grosse et al. 2023's code) on the same model and data, where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast import InfluenceEngine
from tikmix_fast.influence.preconditioners.ekfac import EKFAC

# Imported only where it is installed; it and what it imports use what others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, WIDTH, LENGTH = 23, 12, 9


class Small(nn.Module):
    """Linear layers without bias, which kronfluence folds into the weight's factor and the engine does not."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x):
        h = self.tokens(x)
        h = h + F.scaled_dot_product_attention(*self.qkv(h).chunk(3, dim=-1), is_causal=True)
        h = h + self.down(torch.tanh(self.up(h)))
        return self.head(h)


def summed_loss(model, x):
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")


def kronfluence_scores(model, fitting, queries, train, folder):
    """P g_q times g_t for every pair of sequences, with the empirical Fisher matrix, so that no sampling differs."""
    pytest.importorskip("kronfluence", reason="kronfluence is not installed: pip install kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Causal(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return summed_loss(model, batch[0])

        def compute_measurement(self, batch, model):
            return summed_loss(model, batch[0])

    wrapped = prepare_model(model, Causal())
    analyzer = Analyzer("it", wrapped, Causal(), cpu=True, output_dir=str(folder), disable_tqdm=True)
    analyzer.fit_all_factors(
        "ekfac",
        TensorDataset(fitting),
        per_device_batch_size=4,
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "ekfac",
        TensorDataset(queries),
        TensorDataset(train),
        per_device_query_batch_size=len(queries),
        per_device_train_batch_size=len(train),
        score_args=ScoreArguments(damping_factor=None),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy()


def test_same_influence_as_kronfluence(tmp_path):
    torch.manual_seed(0)
    model = Small().eval()
    fitting, queries, train = (torch.randint(0, VOCABULARY, (rows, LENGTH + 1)) for rows in (24, 3, 5))
    engine = InfluenceEngine(
        model,
        domains=[f"d{j}" for j in range(len(train))],
        tasks=[f"q{i}" for i in range(len(queries))],
        preconditioner="ekfac",
        exclude="tokens.weight",
        reduction="sum",
        task_splits=1,
    )
    for stage in EKFAC.stages:
        for batch in fitting.split(4):
            with engine.fisher(stage, sequences=len(batch), tokens=len(batch) * LENGTH):
                summed_loss(model, batch).backward()
    for i, x in enumerate(queries):
        with engine.task(f"q{i}"):
            summed_loss(model, x[None]).backward()
    with engine.domains(torch.arange(len(train))):
        summed_loss(model, train).backward()
    ours = engine.matrix().values
    theirs = kronfluence_scores(model, fitting, queries, train, tmp_path)
    # Theirs: sums over the sequence, and F per sequence; ours: means per token, and F per token.
    expected = theirs / LENGTH**2 * LENGTH
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= 1e-4 * scale
