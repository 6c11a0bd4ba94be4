"""One complete folder per backend: whether it can run, which calls it takes, what they cost, and the calls."""
