"""Load a transformers checkpoint from a local folder: only safetensors and JSON, no download, no code of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
from torch import nn

from tikmix_fast.arguments import require_choice
from tikmix_fast.data.tokenizing import BYTES, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DTYPES", "Checkpoint", "check_files", "load_checkpoint", "load_tokenizer"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model in evaluation mode, and its limits.

    Attributes
    ----------
    model : nn.Module
        Returns an object with ``logits``.
    vocabulary : int
        Every token id is below it.
    longest : int or None
        Largest number of positions; None: no limit.
    random : bool
        Whether the weights were drawn at random, not read.
    """

    model: nn.Module
    vocabulary: int
    longest: int | None
    random: bool


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    seed: int = 0,
) -> Checkpoint:
    """Load a causal language model that transformers knows.

    Parameters
    ----------
    path : path
        A folder with ``config.json`` and ``*.safetensors``, as ``save_pretrained`` writes it; or a JSON file with a
        configuration, which gets random weights, for trying things out.
    dtype : str
        Dtype of the weights; "auto": as saved, or as the configuration says.
    device : str
    seed : int
        Seed of random weights.

    Raises
    ------
    ModuleNotFoundError
        If transformers is not installed.
    ValueError
        If there is no such model, or it cannot be measured: it is pickled, quantised, an adapter, incomplete, or its
        code is not in transformers.
    """
    require_choice("dtype", dtype, DTYPES)
    check_files(path)
    given = Path(path)
    random = given.is_file()
    with _quiet_transformers() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(str(given), local_files_only=True, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError("its weights are quantised, which is not supported")
            kinds = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            if config.model_type not in kinds:
                raise ValueError(f"transformers knows no causal language model of type {config.model_type!r}")
            config.use_cache = False
            if random:
                torch.manual_seed(seed)
                options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
            else:
                model, report = transformers.AutoModelForCausalLM.from_pretrained(
                    str(given),
                    config=config,
                    dtype=dtype,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # _check_complete names them
                    output_loading_info=True,
                )
                _check_complete(report)
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            OSError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"model {str(given)!r} cannot be used: {reason}") from error
    text = config.get_text_config()
    return Checkpoint(
        model=model.to(device).eval(),
        vocabulary=text.vocab_size,
        longest=getattr(text, "max_position_embeddings", None),
        random=random,
    )


def load_tokenizer(tokenizer: str, model: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from ``tokenizer.json``; "bytes" uses the bytes of UTF-8 as ids, "auto" the model's own file.

    The model's end-of-text token, if its ``config.json`` names one, ends every document.

    Raises
    ------
    ValueError
        If there is no such file, or it cannot be read.
    """
    if tokenizer == BYTES.name:
        return BYTES
    place = Path(model if tokenizer == "auto" else tokenizer)
    folder = place.parent if place.is_file() else place
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"tokenizer must be a folder with tokenizer.json or 'bytes'; {str(folder)!r} has none. "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        )
    with _quiet_transformers():
        import tokenizers
    content = file.read_bytes()
    try:
        loaded = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer {str(file)!r} cannot be read: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
        return ids

    vocabulary = max(loaded.get_vocab().values(), default=0) + 1
    end = _end_of_text(Path(model))
    name = f"tokenizer.json-{hashlib.sha256(content).hexdigest()[:16]}"
    return Tokenizer(name, encode, vocabulary, () if end is None or end >= vocabulary else (end,))


def _end_of_text(model: Path) -> int | None:
    """Return the first end-of-text token that a model's configuration names."""
    file = model if model.is_file() else model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model {str(model)!r} cannot be used: {file.name} is not JSON: {error}") from None
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) and first >= 0 else None


def check_files(path: str | os.PathLike[str]) -> None:
    """Check that the files `load_checkpoint` needs exist, without loading them.

    Raises
    ------
    ValueError
        If a file is missing, or `load_checkpoint` refuses its kind.
    """
    given = Path(path)
    rule = "model must be a local folder with config.json and *.safetensors, or a config.json"
    if given.is_file():
        if given.suffix != ".json":
            raise ValueError(f"{rule}; got the file {str(given)!r}")
        return
    if not given.is_dir():
        raise ValueError(f"{rule}; there is no {str(given)!r}, and nothing is downloaded")
    if (given / "adapter_config.json").exists():
        raise ValueError(f"{rule}; {str(given)!r} is an adapter: merge it into its model and save that")
    if not (given / "config.json").is_file():
        raise ValueError(f"{rule}; {str(given)!r} has no config.json")
    if not any(given.glob("*.safetensors")):
        pickled = sorted(each.name for each in given.glob("*.bin"))
        why = (
            f" ({pickled[0]} is a pickle, which is never loaded: save it again with save_pretrained)" if pickled else ""
        )
        raise ValueError(f"{rule}; {str(given)!r} has no *.safetensors{why}")


def _check_complete(report: Mapping[str, Any]) -> None:
    for key, what in (("missing_keys", "lacks the weights"), ("mismatched_keys", "has another shape of")):
        names = sorted(each if isinstance(each, str) else each[0] for each in report.get(key) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"the checkpoint {what} {', '.join(names[:3])}{more}")


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Import transformers in offline mode, and silence it inside the context."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"checkpoints need the packages transformers and tokenizers: pip install transformers ({error})"
        ) from error
    logs: Any = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield transformers
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
