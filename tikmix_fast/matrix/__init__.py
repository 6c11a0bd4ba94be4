"""The influence matrix, its estimator and its errors; numpy only."""
