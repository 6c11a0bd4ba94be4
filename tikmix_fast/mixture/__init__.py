"""From an influence matrix to a mixture: TiKMiX-D and its solvers, TiKMiX-M and its models. Never torch."""
