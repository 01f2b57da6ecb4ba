"""The sweep over public models, `python -m benchmarks.zoo`: all architectures that can be built tiny, against a loop.

tiny.py shrinks a configuration; language.py, adapters.py and images.py say what there is and build one of it; loop.py
is the float64 loop that Grams are held to; judge.py compares, in a process of its own; table.py shows the rows.
"""
