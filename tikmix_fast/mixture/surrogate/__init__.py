"""TiKMiX-M: a surrogate of what mixtures lead to, and the search on it."""
