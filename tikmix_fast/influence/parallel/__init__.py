"""Several processes, sharded weights, and copies between host and device."""
