"""Measurements that anyone can repeat: `python -m benchmarks.NAME`. They print JSON, and ratios taken in one run."""
