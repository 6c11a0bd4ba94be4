"""When a run measures, and whether a change of mixture is worth it."""
