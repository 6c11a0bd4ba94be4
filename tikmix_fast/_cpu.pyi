"""Native CPU kernels, on addresses, sizes and strides. A matrix is (address, dtype code, row stride, column stride)."""

_Matrix = tuple[int, int, int, int]

def instruction_sets() -> list[str]: ...
def earliest_first(*, keys: int, arrived: int, slots: int, drawn: int) -> None: ...
def packed_layout(*, instruction_set: str, dtype: int) -> tuple[int, int, int]: ...
def pack_queries(
    *,
    instruction_set: str,
    threads: int,
    height: int,
    width: int,
    queries: tuple[int, int, int, int, int, int],
    panels: int,
) -> None: ...
def group_influence(
    *,
    instruction_set: str,
    threads: int,
    sizes: tuple[int, int, int, int],
    input: tuple[int, int, int, int],
    grad_output: tuple[int, int, int, int],
    queries: tuple[int, int, int, int, int, int],
    offsets: int,
    order: int,
    grad_weight: tuple[int, int, int],
    values: int,
) -> None: ...
def sketch_rows(
    *, instruction_set: str, threads: int, sizes: tuple[int, int, int], input: _Matrix, codes: int, output: int
) -> None: ...
