"""One forward and backward inside a context of the engine: what is recorded and how it is checked."""
