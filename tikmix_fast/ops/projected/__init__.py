"""Projected influence as functions on tensors: schema, estimates, and their standard error."""
