"""Partition parameter names into labelled blocks: every name in exactly one, none left out."""

from collections.abc import Callable, Iterable, Mapping

_RULES = "by_layer, by_module, by_parameter, whole or any function from a name to a label"


def partition(names: Iterable[str], by: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Group parameter names by the label that a rule gives them.

    Args:
        names: Parameter names, each once; a mapping of parameters counts by its keys.
        by: The rule. Labels kept in a dictionary go in as its ``get``.

    Returns:
        For each label its names; labels and names in order of first appearance.

    Raises:
        TypeError: If `by` is not callable, or a name or a label is not a string.
        ValueError: If there are no names, a name occurs twice, or a label is empty.

    Example:
        >>> from fisherfunc.partitioning import by_layer
        >>> partition(["h.0.attn.weight", "ln_f.weight", "h.0.attn.bias"], by_layer)
        {'layer.0': ('h.0.attn.weight', 'h.0.attn.bias'), 'final_norm': ('ln_f.weight',)}
        >>> partition(["a.w", "b.w", "a.b"], lambda name: name.split(".")[1])
        {'w': ('a.w', 'b.w'), 'b': ('a.b',)}
    """
    if not callable(by):
        raise TypeError(f"cannot partition by {by!r} of type {_type(by)}; pass {_RULES}")
    blocks: dict[str, list[str]] = {}
    for name in _checked(names):
        blocks.setdefault(_label(name, by), []).append(name)
    return {label: tuple(members) for label, members in blocks.items()}


def labels_of(blocks: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The other way round: the label of each name of a partition.

    Example:
        >>> labels_of({"w": ("a.w", "b.w"), "b": ("a.b",)})
        {'a.w': 'w', 'b.w': 'w', 'a.b': 'b'}
    """
    return {name: label for label, names in blocks.items() for name in names}


def rule_name(rule: Callable[[str], str]) -> str:
    """What results call a rule."""
    return getattr(rule, "__name__", type(rule).__name__)


def _checked(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"cannot partition the string {names!r}; pass an iterable of names, [{names!r}]")
    listed = list(names)
    if not listed:
        raise ValueError("cannot partition: no parameter names; check that the model has parameters")
    seen: set[str] = set()
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(
                f"cannot partition {name!r} of type {_type(name)}: expected parameter names (str); "
                "of named_parameters() pass the names only"
            )
        if name in seen:
            raise ValueError(
                f"parameter name {name!r} occurs more than once among {len(listed)}; expected "
                "each once, as in dict(model.named_parameters()); prefix the names of each model"
            )
        seen.add(name)
    return listed


def _label(name: str, by: Callable[[str], str]) -> str:
    label = by(name)
    if not isinstance(label, str):
        raise TypeError(
            f"{by!r} gave parameter {name!r} the label {label!r} of type {_type(label)}; "
            "expected a non-empty str; return 'other' for what the rule does not place"
        )
    if not label:
        raise ValueError(
            f"{by!r} gave parameter {name!r} the label ''; "
            "expected a non-empty str; return 'other' for what the rule does not place"
        )
    return label


def _type(value: object) -> str:
    return type(value).__name__
