"""Suites that only this repository runs."""
