"""Influence at a checkpoint on disk."""
