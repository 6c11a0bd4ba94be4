"""Words, tables and pictures made of results."""
