"""One folder per backend, complete: what it can take, what it costs, and the call itself."""
