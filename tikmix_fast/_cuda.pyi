"""Types of the native CUDA module; what the arguments mean is said in csrc/cuda/module.cpp."""

architectures: str
toolkit_version: tuple[int, int]
has_wgmma: bool

def compute_capability(device: int) -> tuple[int, int]: ...
def packed_layout(*, kernel: str, element: int) -> tuple[int, int, int, int, int]: ...
def pack_queries(
    *,
    kernel: str,
    sizes: tuple[int, int, int],
    queries: tuple[int, int, int, int, int],
    panels: tuple[int, int],
    stream: int,
) -> None: ...
def plan(*, kernel: str, sizes: tuple[int, int, int], multiprocessors: int) -> tuple[int, int, int]: ...
def group_influence(
    *,
    kernel: str,
    multiprocessors: int,
    sizes: tuple[int, int, int, int, int],
    splits: int,
    element: int,
    input: tuple[int, int],
    grad_output: tuple[int, int],
    offsets: int,
    order: int,
    queries: tuple[int, int],
    grad_weight: tuple[int, int, int],
    workspace: tuple[int, int],
    values: int,
    flag: int,
    stream: int,
) -> None: ...
def plan_projected(*, device: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]: ...
def write_factor(
    *,
    multiprocessors: int,
    factor: tuple[int, int, int, int],
    matrix: tuple[int, int, int, int],
    stream: int,
) -> None: ...
def projected_group_influence(
    *,
    multiprocessors: int,
    sizes: tuple[int, int, int, int, int],
    dims: tuple[int, int],
    plan: tuple[int, int, int],
    element: int,
    input: tuple[int, int],
    grad_output: tuple[int, int],
    offsets: int,
    order: int,
    queries: int,
    matrices: tuple[int, int],
    scale: float,
    workspace: tuple[int, int],
    values: int,
    gradients: int,
    flag: int,
    stream: int,
) -> None: ...
