"""Native CPU kernels, on addresses, sizes and strides. A matrix is (address, dtype code, row stride, column stride)."""

_Matrix = tuple[int, int, int, int]

def instruction_sets() -> list[str]: ...
def group_influence(
    *,
    instruction_set: str,
    threads: int,
    sizes: tuple[int, int, int, int, int],
    input: _Matrix,
    grad_output: _Matrix,
    queries: _Matrix,
    query_stride: int,
    offsets: int,
    order: int,
    grad_weight: tuple[int, int, int],
    values: int,
) -> None: ...
def sketch_rows(
    *, instruction_set: str, threads: int, sizes: tuple[int, int, int], input: _Matrix, codes: int, output: int
) -> None: ...
def random_words(*, seed: int, stream: int, place: tuple[int, int, int], words: int) -> None: ...
