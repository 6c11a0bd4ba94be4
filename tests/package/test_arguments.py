"""One set of words for mistakes in plain arguments."""

from __future__ import annotations

import numpy as np
import pytest

from tikmix_fast.arguments import require_choice, require_int


def test_integers_of_numpy_become_ints():
    number = require_int("batch", np.int64(3), 1)
    assert number == 3
    assert type(number) is int
    assert require_int("shift", -7) == -7


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, "2", None, [2]])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match=r"^batch must be an int of at least 1; got "):
        require_int("batch", value, 1)
    with pytest.raises(ValueError, match=r"^batch must be an int; got "):
        require_int("batch", value)


@pytest.mark.parametrize("value", [-1, 4])
def test_a_range_includes_its_ends(value):
    assert (require_int("rank", 0, 0, 3), require_int("rank", 3, 0, 3)) == (0, 3)
    with pytest.raises(ValueError, match=rf"^rank must be an int from 0 to 3; got {value}$"):
        require_int("rank", value, 0, 3)


def test_a_choice_lists_what_there_is():
    require_choice("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^kind must be one of 'a', 'b'; got 'c'$"):
        require_choice("kind", "c", ("a", "b"))
