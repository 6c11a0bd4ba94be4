"""CUDA part of tikmix_fast: what it was built for. It holds no kernel yet."""

architectures: str
toolkit_version: tuple[int, int]

def compute_capability(device: int) -> tuple[int, int]: ...
