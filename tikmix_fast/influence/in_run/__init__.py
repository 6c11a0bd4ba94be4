"""Influence from a training run's own batches: measured steps now and then."""
