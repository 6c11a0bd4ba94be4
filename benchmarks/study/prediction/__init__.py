"""Does S predict? Influence of a small GPT trained here, against what training does.

Run ``python -m benchmarks.study.prediction``; ``--help`` says how.
"""
