"""What a run trains on: corpora of text per domain, and the sampler that mixes them."""
