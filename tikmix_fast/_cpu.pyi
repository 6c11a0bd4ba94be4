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
