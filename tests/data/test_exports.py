"""Exports: what each library reads back is the mixture, and sums to one."""

from __future__ import annotations

import json
import sys
import types
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tikmix_fast import files
from tikmix_fast.data.exports.energon import metadataset, scheduled_metadataset
from tikmix_fast.data.exports.hugging_face import interleave_probabilities
from tikmix_fast.data.exports.megatron import blend_list
from tikmix_fast.data.exports.mixtera import mixture_file_algorithm
from tikmix_fast.data.exports.shares import decimals
from tikmix_fast.data.exports.streaming import stream_arguments

WEIGHTS = {"web": 0.5, "code": 1 / 3, "books": 1 / 6, "none": 0.0}
PATHS = {"web": "/data/web", "code": "/data/my code", "books": '/data/"b": #1\\', "none": "/data/none"}


def mixtures(most):
    raw = st.lists(st.floats(0, 1), min_size=1, max_size=most).filter(lambda values: sum(values) > 0.01)
    return raw.map(lambda values: {f"d{j}": value / sum(values) for j, value in enumerate(values)})


@given(mixtures(most=40), st.integers(2, 15))
def test_decimals_sum_to_one_and_are_the_nearest(weights, digits):
    rounded = {name: Decimal(text) for name, text in decimals(weights, digits).items()}
    unit = Decimal(1).scaleb(-digits)
    assert list(rounded) == list(weights)
    assert sum(rounded.values()) == 1
    raised = [name for name in weights if 0 < weights[name] < unit]
    for name, weight in weights.items():
        assert (rounded[name] == 0) == (weight == 0)
        if weight >= unit and not raised:
            assert abs(rounded[name] - Decimal(weight)) < unit + Decimal("1e-15")


def test_decimals_that_cannot_tell_a_domain_from_zero_are_refused():
    many = {f"d{j}": 1 / 20 for j in range(20)}
    assert set(decimals(many, 2).values()) == {"0.05"}
    with pytest.raises(ValueError, match="digits must be more than 1, so that each of 20 domains can be above 0"):
        decimals(many, 1)
    assert decimals({"tiny": 1e-9, "rest": 1 - 1e-9}, 3) == {"tiny": "0.001", "rest": "0.999"}
    for digits in (0, 16):
        with pytest.raises(ValueError, match="digits must be an int from 1 to 15"):
            decimals(many, digits)


EXPORTS = {
    "interleave": lambda weights: interleave_probabilities(weights, list(PATHS)),
    "megatron": lambda weights: blend_list(weights, PATHS),
    "energon": lambda weights: metadataset(weights, PATHS),
    "scheduled": lambda weights: scheduled_metadataset({0: weights}, PATHS),
    "streaming": lambda weights: stream_arguments(weights, {name: {"local": path} for name, path in PATHS.items()}),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"none": 0.1}, ValueError, "weights must be .*sum to 1 within 1e-6; got sum 1.1"),
        ({"none": float("nan")}, ValueError, "weights must be at least 0.*got sum (nan|inf)"),
        ({"web": 0.6, "none": -0.1}, ValueError, "weights must be at least 0.*least weight -0.1"),
        ({"more": 0.0}, ValueError, "must name every domain once"),
        (None, TypeError, "weights must map names to numbers; got list"),
    ],
)
def test_what_is_no_mixture_of_the_domains_is_refused(export, change, error, message):
    with pytest.raises(error, match=message):
        export([0.5, 0.5] if change is None else {**WEIGHTS, **change})


def test_datasets_draws_in_these_probabilities():
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    order = ["none", "books", "web", "code"]
    probabilities = interleave_probabilities(WEIGHTS, order)
    assert probabilities == [WEIGHTS[name] for name in order]
    parts = [datasets.Dataset.from_dict({"domain": [name] * 6000}) for name in order]
    mixed = datasets.interleave_datasets(parts, probabilities, seed=0)["domain"]
    for name in order:
        share = sum(each == name for each in mixed) / len(mixed)
        assert abs(share - WEIGHTS[name]) < 4 * (0.25 / len(mixed)) ** 0.5  # four standard errors


def read_blend(words):
    """Read as Megatron's get_blend_from_list does: every other word is a weight, if all of them are numbers."""
    return dict(zip(words[1::2], map(float, words[::2]), strict=True))


def test_megatron_reads_weights_and_prefixes():
    blend = read_blend(blend_list(WEIGHTS, PATHS))
    assert blend == {PATHS["web"]: 0.5, PATHS["code"]: 0.333333, PATHS["books"]: 0.166667}
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="megatron-core is not installed")
    prefixes, weights = utils.get_blend_from_list(blend_list(WEIGHTS, PATHS))
    assert dict(zip(prefixes, weights, strict=True)) == blend


def test_energon_reads_weights_and_paths():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    content = yaml.safe_load(metadataset(WEIGHTS, PATHS, split="val"))
    assert (content["__module__"], content["__class__"]) == ("megatron.energon", "MetadatasetV2")
    assert list(content["splits"]) == ["val"]
    assert content["splits"]["val"]["blend"] == [
        {"weight": 0.5, "path": PATHS["web"]},
        {"weight": 0.333333, "path": PATHS["code"]},
        {"weight": 0.166667, "path": PATHS["books"]},
    ]


def test_energon_reads_a_schedule():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    later = {"web": 0.25, "code": 0.0, "books": 0.75, "none": 0.0}
    content = yaml.safe_load(scheduled_metadataset({200: later, 0: WEIGHTS}, PATHS, digits=3))
    assert content["splits"]["train"]["blend"] == [
        {"weight": {"step": {0: 0.5, 200: 0.25}}, "path": PATHS["web"]},
        {"weight": {"step": {0: 0.333, 200: 0.0}}, "path": PATHS["code"]},
        {"weight": {"step": {0: 0.167, 200: 0.75}}, "path": PATHS["books"]},
    ]
    for schedule in ({}, {5: WEIGHTS}, {-1: WEIGHTS, 0: WEIGHTS}):
        with pytest.raises(ValueError, match="schedule must begin at batch 0"):
            scheduled_metadataset(schedule, PATHS)


def test_streams_get_their_proportions():
    streams = {name: {"local": path, "split": "train"} for name, path in PATHS.items()}
    arguments = stream_arguments(WEIGHTS, streams)
    assert arguments["code"] == {"local": "/data/my code", "split": "train", "proportion": pytest.approx(1 / 3)}
    assert sum(each["proportion"] for each in arguments.values()) == pytest.approx(1, abs=1e-15)
    with pytest.raises(ValueError, match=r"streams\['web'\] must leave the share to weights; got repeat"):
        stream_arguments(WEIGHTS, {**streams, "web": {"local": "/data/web", "repeat": 2}})
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")
    datasets = [streaming.Stream(**each) for each in arguments.values()]
    assert [stream.proportion for stream in datasets] == [each["proportion"] for each in arguments.values()]


MIXTERA = "mixtera.core.algo.dynamic_mixing.dynamic_mixing"


class MixteraBase:
    """What Mixtera's abstract class asks of an algorithm: state, and `calc_mixture` at every feedback."""

    def __init__(self):
        self.initial_mixture = np.array([-1], dtype=np.float32)

    def process_losses(self, losses, counts, mixture_id):
        return self.calc_mixture(mixture_id > 0)


@pytest.fixture
def mixtera(monkeypatch):
    """Mixtera where it is installed, else a stand-in of the same interface."""
    try:
        __import__(MIXTERA)
    except ModuleNotFoundError:
        parts = MIXTERA.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[MIXTERA].DynamicMixingAlgorithm = MixteraBase


@pytest.mark.usefixtures("mixtera")
def test_mixtera_follows_the_file(tmp_path):
    file = tmp_path / "mixture.json"
    algorithm = mixture_file_algorithm(file, ["code", "web"])
    algorithm.initial_mixture = np.array([0.2, 0.5, 0.3], dtype=np.float32)  # Mixtera has a third key

    def asked():
        mixture = algorithm.process_losses(np.ones(3, np.float32), np.ones(3, np.int64), 1)
        return None if mixture is None else mixture.tolist()

    assert asked() is None
    files.write_json(file, {"web": 0.75, "code": 0.25})
    assert asked() == [0.25, 0.75, 0.0]
    assert asked() is None
    files.write_json(file, {"weights": {"web": 0.5, "code": 0.5}, "success": True})
    assert asked() == [0.5, 0.5, 0.0]
    for wrong, message in (
        ('{"web": 1.0}', "must name every domain once"),
        ('{"web": 0.75, "code": 0.75}', "weights must be at least 0 and sum to 1"),
        ('{"weights": [0.5, 0.5]}', "float"),
        ("{", "is not JSON"),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=rf"mixture.json: .*{message}"):
            asked()


@pytest.mark.usefixtures("mixtera")
def test_mixtera_can_send_the_algorithm_to_its_server(tmp_path):
    dill = pytest.importorskip("dill", reason="needs dill, which Mixtera sends queries with")
    files.write_json(tmp_path / "mixture.json", {"web": 0.75, "code": 0.25})
    sent = dill.loads(dill.dumps(mixture_file_algorithm(tmp_path / "mixture.json", ["code", "web"])))
    assert sent.process_losses(np.ones(2, np.float32), np.ones(2, np.int64), 1).tolist() == [0.25, 0.75]


@pytest.mark.usefixtures("mixtera")
@pytest.mark.parametrize("domains", [[], ["web", "web"]])
def test_mixtera_needs_domains(domains):
    with pytest.raises(ValueError, match="domains must have at least one name, and each once"):
        mixture_file_algorithm("mixture.json", domains)


def test_without_mixtera_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, MIXTERA, None)
    monkeypatch.setitem(sys.modules, "mixtera", None)
    with pytest.raises(ImportError, match=r"needs the package mixtera; install it: see github.com/eth-easl/mixtera"):
        mixture_file_algorithm("mixture.json", ["web"])


def test_a_package_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "mixtera").mkdir()
    (tmp_path / "mixtera" / "__init__.py").write_text("import something_else_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mixtera"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing"):
        mixture_file_algorithm("mixture.json", ["web"])


def test_a_result_can_be_exported():
    from tikmix_fast import InfluenceMatrix, tikmix_d

    matrix = InfluenceMatrix.from_values(np.eye(3), domains=["web", "code", "books"])
    weights = tikmix_d(matrix, prior=dict.fromkeys(matrix.domains, 1 / 3)).as_dict()
    words = blend_list(weights, {name: f"/data/{name}" for name in weights})
    assert sum(map(Decimal, words[::2])) == 1
    assert json.loads(json.dumps(words)) == words
