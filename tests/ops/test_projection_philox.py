"""The generator: its published answers, and the same bits from torch and from native code."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast import ops
from tikmix_fast.ops.backends.cpu import cpu
from tikmix_fast.ops.backends.cpu.sketch import write_random_words
from tikmix_fast.ops.common.philox import philox4x32, random_words, random_words_in_torch

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    assert philox4x32(torch.tensor(words(counter)), (low, high)).tolist() == words(answer)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_places(counter: str, key: str, answer: str) -> None:
    """A place's counter is (column, row, low word of the stream, high word): the vectors' own, one place each."""
    column, row, stream_low, stream_high = words(counter)
    low, high = words(key)
    seed, stream = high << 32 | low, stream_high << 32 | stream_low
    assert random_words_of_one_place(seed, stream, row, column) == words(answer)


def random_words_of_one_place(seed: int, stream: int, row: int, column: int) -> list[int]:
    if column > 1 << 20:  # too far right to draw from column 0 on
        place = torch.tensor([column, row, stream & 0xFFFFFFFF, stream >> 32])
        return philox4x32(place, (seed & 0xFFFFFFFF, seed >> 32)).tolist()
    return random_words(seed, stream, 1, column + 1, first_row=row)[0, column].tolist()


@pytest.mark.parametrize("first_row", [0, 5, 1 << 31, (1 << 32) - 3])
@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("stream", [0, (1 << 64) - 1, 1 << 32])
def test_native_words_are_those_of_torch(seed: int, stream: int, first_row: int) -> None:
    if cpu.unavailable() is not None:
        pytest.skip(cpu.unavailable())
    native = torch.empty(3, 37, 4, dtype=torch.int64)
    write_random_words(seed, stream, first_row, native)
    assert torch.equal(native, random_words_in_torch(seed, stream, 3, 37, first_row=first_row))
    assert len(native.unique()) == native.numel()


@pytest.mark.parametrize("kind", ["countsketch", "rademacher", "gaussian"])
def test_a_projection_is_the_same_without_native_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> ops.LayerProjection:
        return ops.LayerProjection(300, 170, k_out=64, k_in=16, kind=kind, seed=(1 << 63) + 9, layer="blocks.3.mlp")

    native = draw()
    monkeypatch.setattr(cpu, "unavailable", lambda: "for this test")
    plain = draw()
    assert torch.equal(plain.output_factor, native.output_factor)
    assert torch.equal(plain.input_factor, native.input_factor)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [0, 1, 4])
def test_empty_and_single_places(rows: int, columns: int) -> None:
    drawn = random_words(1, 2, rows, columns)
    assert drawn.shape == (rows, columns, 4)
    assert torch.equal(drawn, random_words(1, 2, 5, 6)[:rows, :columns])
