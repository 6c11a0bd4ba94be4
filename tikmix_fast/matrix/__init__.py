"""The influence matrix, its estimator and its errors; numpy and scipy only, never torch."""
