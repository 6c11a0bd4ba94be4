"""What every kernel shares: checks of arguments, and the random matrices of projections."""
