"""Words, tables and pictures of results."""
