"""A mixture in the words of the data loaders that people already run. Nothing here imports them."""
