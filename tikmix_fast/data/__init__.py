"""Training data: files of each domain as sequences, the sampler that mixes domains, and exports to other loaders."""
