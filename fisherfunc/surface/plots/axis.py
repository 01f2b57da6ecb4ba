"""The order of results that are called after a number: checkpoint-50, checkpoint-100, checkpoint-1000."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")


def varying_number(names: Sequence[str]) -> list[float]:
    """Return the number of each name, where the names are the same but for one number; else nothing.

    Example:
        >>> varying_number(["run2/step-100", "run2/step-50"]), varying_number(["lr-1e-3", "lr-0.25"])
        ([100.0, 50.0], [0.001, 0.25])
        >>> varying_number(["before", "after"]), varying_number(["a1-step2", "a2-step1"])
        ([], [])
    """
    parts = [_NUMBER.split(name) for name in names]
    if len({tuple(words[0::2]) for words in parts}) != 1:
        return []
    places = [column for column in zip(*(words[1::2] for words in parts), strict=True) if len(set(column)) > 1]
    values = [float(number) for number in places[0]] if len(places) == 1 else []
    return values if len(set(values)) == len(values) else []


def axis_name(names: Sequence[str]) -> str:
    """Return what the number of such names counts: what stands before it, or "step".

    Example:
        >>> axis_name(["checkpoint-50", "checkpoint-100"]), axis_name(["run/lr-0.1", "run/lr-1"]), axis_name(["5", "6"])
        ('checkpoint', 'lr', 'step')
    """
    parts = [_NUMBER.split(name) for name in names]
    columns = list(zip(*parts, strict=True))
    place = next(index for index, column in enumerate(columns) if len(set(column)) > 1)
    before = re.findall(r"[^\W\d]+", columns[place - 1][0])
    return before[-1] if before else "step"
