"""Which axis of logits holds the classes: torch's `(b, v, …)` or Transformers' `(b, …, v)`, told by the labels' shape.

Labels have the axes of the logits but that one. Where v is as large as the positions both fit, and nothing but the user
can tell: then it is asked for. Axis order: logits in, `(b, s, v)` out, positions of several axes in one.
"""

from jaxtyping import Float
from torch import Tensor

CONVENTIONS = (1, -1)


def classes_last(logits: Tensor, labels: tuple[int, ...], class_axis: int | None) -> Float[Tensor, "b s v"]:
    """The logits with one axis of positions and the classes last.

    Args:
        logits: As the model gives them.
        labels: The shape of the labels.
        class_axis: Where the classes are; None where the shapes say it.

    Raises:
        ValueError: If there is no such axis, the shapes leave two readings, or there is one class only.
    """
    if logits.ndim < 2:
        raise ValueError(
            f"classification expected logits with an axis of classes, (samples, classes), got {tuple(logits.shape)}; "
            "one logit a sample is ff.losses.binary_classification(), with targets 0 or 1"
        )
    shape = tuple(logits.shape)
    if shape == labels:
        raise ValueError(
            f"classification expected logits with an axis of classes beside those of the labels, got both of shape "
            f"{labels}; targets 0 or 1 of each logit are ff.losses.binary_classification(), real values "
            "ff.losses.regression()"
        )
    axis = _read(shape, labels) if class_axis is None else _told(shape, labels, class_axis)
    if logits.shape[axis] == 1:
        raise ValueError(
            f"classification expected two classes or more, got logits of shape {tuple(logits.shape)}: a single class "
            "has probability 1 and no gradient; one logit with targets 0 or 1 is ff.losses.binary_classification(), "
            "one output with real targets ff.losses.regression()"
        )
    last = logits.movedim(axis, -1)
    return last[:, None] if last.ndim == 2 else last.flatten(1, -2)


def _told(logits: tuple[int, ...], labels: tuple[int, ...], class_axis: int) -> int:
    rank = len(logits)
    if not -rank < class_axis < rank or class_axis == 0:
        raise ValueError(
            f"class_axis={class_axis} is none of logits of shape {logits}; expected one after the axis of samples, "
            "such as 1 or -1"
        )
    axis = class_axis % rank
    others = [other for other in CONVENTIONS if _without(logits, other % rank) == labels]
    if others and _without(logits, axis) != labels:
        raise ValueError(
            f"classes on axis {axis} of logits of shape {logits} leave positions of shape {_without(logits, axis)}, "
            f"and the labels have {labels}; loss=ff.losses.classification(class_axis={others[0]}) fits, and for a "
            "language model ff.losses.causal_lm(), masked_lm() or seq2seq_lm()"
        )
    return axis


def _read(logits: tuple[int, ...], labels: tuple[int, ...]) -> int:
    """The axis without which the logits have the labels' shape; the last where none is it, which is found later."""
    rank = len(logits)
    fitting = {axis % rank for axis in CONVENTIONS if _without(logits, axis % rank) == labels}
    if len(fitting) > 1:
        raise ValueError(
            f"logits of shape {logits} and labels of shape {labels} can be read as (samples, classes, positions) and "
            "as (samples, positions, classes), which have different losses; say which: "
            "loss=ff.losses.classification(class_axis=1) or classification(class_axis=-1)"
        )
    return fitting.pop() if fitting else -1


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
