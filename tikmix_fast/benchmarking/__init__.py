"""What ``tikmix-fast bench`` and ``benchmarks/`` measure: cases, baselines, and how they are timed side by side."""
