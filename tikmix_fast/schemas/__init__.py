"""JSON schemas (draft 2020-12) of files that this package writes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

from tikmix_fast.arguments import require_choice

__all__ = ["schema"]


def schema(name: Literal["influence_matrix", "mixture"]) -> dict[str, Any]:
    """Return a schema, for any validator.

    Parameters
    ----------
    name : {"influence_matrix", "mixture"}
        "influence_matrix": files of `InfluenceMatrix.save`. "mixture": `MixtureResult.to_dict`, and files of
        ``tikmix-fast mix --out``. A schema cannot state that shapes agree and weights sum to 1; loading a file checks
        that.

    Raises
    ------
    ValueError
        If there is no such schema.

    Examples
    --------
    >>> schema("mixture")["required"][:2]
    ['weights', 'prior']
    """
    require_choice("name", name, ("influence_matrix", "mixture"))
    content: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return content
