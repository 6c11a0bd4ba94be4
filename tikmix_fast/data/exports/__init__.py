"""Mixtures in the formats of other data loaders. Nothing here imports them, except `mixtera` when it is used."""
