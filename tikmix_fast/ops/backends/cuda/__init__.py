"""The native CUDA backend, and the vendor's grouped product."""
