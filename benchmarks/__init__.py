"""Measurements that anyone can repeat: `python -m benchmarks`, `benchmarks.predictions` and `benchmarks.profile`.

workloads.py says what is run, contenders/ who runs, oracle.py who passes, measure.py and process.py how it is measured,
floor.py, gemm.py and targets.py what it is held to, table.py and plot.py how it is shown,
sections.py and stopwatch.py where the time of fisherfunc's own run goes.
"""
