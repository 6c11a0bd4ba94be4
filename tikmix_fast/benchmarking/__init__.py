"""The measurements of ``tikmix-fast bench``: cases, baselines, and their timing in turn."""
