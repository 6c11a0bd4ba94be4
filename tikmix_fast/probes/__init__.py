"""Real optimizer steps from a snapshot of the run, and the exact way back."""
