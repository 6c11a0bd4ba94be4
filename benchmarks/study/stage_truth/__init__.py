"""What a mixture really does over a stage: the truth by which every signal is judged.

Run ``python -m benchmarks.study.stage_truth``; ``--help`` says how.
"""
