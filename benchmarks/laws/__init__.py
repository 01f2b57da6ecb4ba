"""The law suite, `python -m benchmarks.laws`: generated modules and batches, each against a plain float64 loop.

The law: the result is the loop's, or an error of our own; what is the user's is bitwise what it was.

recipe.py draws what a case is, from one integer; parts/ are what modules are made of; model.py and batches.py make the
module and the batch; loop.py is the loop, which imports nothing of the package; picture.py sees what was changed;
judge.py gives the verdict.
"""
