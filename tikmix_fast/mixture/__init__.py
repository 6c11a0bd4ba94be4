"""From an influence matrix to a mixture: TiKMiX-D and its solvers. numpy and scipy only, never torch."""
