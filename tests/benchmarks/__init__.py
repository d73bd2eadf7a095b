"""Benchmarks: `python -m tests.benchmarks.<name>`. They print ratios measured in one run."""
