"""The study: ways to choose a data mixture, each trained on the same tokens with the same small model."""
