"""The arguments of a call: what is among them, and others in their place."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fisherfunc.gradients.capture.arguments import exchanged, leaves_among

LEAVES = st.integers() | st.text(max_size=2) | st.none()
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict)
    ),
)


@given(st.lists(NESTED))
def test_what_is_inside_of_collections_is_among_the_arguments(values):
    assert list(leaves_among(values)) == pytree.tree_leaves(values, is_leaf=lambda value: value is None)


def test_arguments_are_exchanged_by_identity_and_lists_stay_as_they_are():
    mine, equal, others = [1], [1], object()
    args, kwargs = exchanged((mine, [mine], equal), {"input": mine, "other": 2}, {id(mine): others})
    assert args[0] is others and args[1][0] is mine and args[2] is equal
    assert kwargs == {"input": others, "other": 2}
    assert exchanged((mine,), kwargs, {}) == ((mine,), kwargs)
