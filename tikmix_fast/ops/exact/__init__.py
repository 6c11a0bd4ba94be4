"""Exact influence as functions on tensors: schema, packed queries."""
