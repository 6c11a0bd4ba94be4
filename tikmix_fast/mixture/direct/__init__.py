"""TiKMiX-D: the mixture solved for directly."""
