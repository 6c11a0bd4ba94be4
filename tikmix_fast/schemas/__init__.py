"""JSON schemas (draft 2020-12) of the files that this package writes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

__all__ = ["schema"]


def schema(name: Literal["influence_matrix", "mixture"]) -> dict[str, Any]:
    """Return a schema, for any validator.

    Parameters
    ----------
    name : {"influence_matrix", "mixture"}
        "influence_matrix": what `InfluenceMatrix.save` writes. "mixture": `MixtureResult.to_dict`, and the file of
        ``tikmix-fast mix --out``. What a schema cannot say, that shapes agree and weights sum to 1, is checked on
        loading.

    Raises
    ------
    ValueError
        If there is no such schema.

    Examples
    --------
    >>> schema("mixture")["required"][:2]
    ['weights', 'prior']
    """
    if name not in ("influence_matrix", "mixture"):
        raise ValueError(f"name must be 'influence_matrix' or 'mixture'; got {name!r}")
    content: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return content
