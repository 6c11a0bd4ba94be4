"""Build, test, measure and profile on a machine with a GPU: ``python -m benchmarks.gpu``."""
