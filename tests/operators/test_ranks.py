"""Two gloo ranks, each with sequences of its own, have the products and eigenvalues of one process."""

import pytest
import torch
from operator_rank import COUNTS, found_of, main, operator_of, setting
from started import ranks_started

import fisherfunc as ff

KINDS = ("plain", "float32", "central difference", "other parameters")  # the last after the others: it ends in an error


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory):
    """{kind: what each of two ranks found}."""
    folder = tmp_path_factory.mktemp("ranks")
    assert ranks_started(main, folder, KINDS, size=2) == [0, 0]
    zero, one = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return {kind: (zero[kind], one[kind]) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    # sums of ten rows in another order; of a difference, its step is another on each rank
    [("plain", torch.float64, 1e-12), ("float32", torch.float32, 1e-5), ("central difference", torch.float64, 1e-6)],
)
def test_two_ranks_equal_one(kind, dtype, tolerance, over_ranks):
    model, batch = setting(dtype)
    derivative = "central difference" if kind == "central difference" else "auto"
    want = found_of(operator_of(model, batch, derivative=derivative))
    first, second = over_ranks[kind]
    for name, value in want.items():
        if name == "bounds":
            continue
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)  # every rank has the same bits
        torch.testing.assert_close(first[name], value, rtol=tolerance, atol=tolerance)
    off = (first["eigenvalues"] - want["eigenvalues"]).abs()
    assert bool((off <= first["bounds"] + want["bounds"]).all())
    assert first["num_tokens"] == sum(COUNTS)


def test_ranks_of_other_parameters_are_one_error_on_both(over_ranks):
    found = over_ranks["other parameters"]
    assert [each["error"].split(";")[0] for each in found] == ["rank 1 and rank 0 differ in parameters"] * 2


def test_without_a_group_the_error_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group; under torchrun, call that first"):
        ff.operators.over_ranks(operator_of(*setting()))
