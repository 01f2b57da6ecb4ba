"""Batches of any kind as sequences: nothing lost, nothing mixed."""

from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.gradients.sequences import cast, split


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_concatenating_the_sequences_gives_the_batches_back(sizes, length):
    batches = [{"input_ids": torch.randint(9, (size, length)), "extra": (torch.rand(size, 2),)} for size in sizes]
    sequences = split(batches)
    assert len(sequences) == sum(sizes)
    assert torch.equal(torch.cat([s["input_ids"] for s in sequences]), torch.cat([b["input_ids"] for b in batches]))
    assert torch.equal(torch.cat([s["extra"][0] for s in sequences]), torch.cat([b["extra"][0] for b in batches]))


def test_a_single_row_and_what_is_no_tensor_go_with_every_sequence():
    batch = {"input_ids": torch.ones(3, 4), "position_ids": torch.arange(4)[None], "scale": torch.tensor(2.0), "n": "x"}
    for sequence in split(batch):
        assert torch.equal(sequence["position_ids"], batch["position_ids"])
        assert sequence["scale"] == 2 and sequence["n"] == "x"


def test_any_mapping_will_do():
    assert [s["input_ids"].tolist() for s in split(UserDict(input_ids=torch.tensor([[1], [2]])))] == [[[1]], [[2]]]


def test_sequences_share_memory_and_carry_no_graph():
    ids = torch.zeros(2, 3, requires_grad=True)
    first = split((ids * 1, torch.tensor([0, 1])))[0][0]
    assert not first.requires_grad
    batch = (torch.zeros(2, 3), torch.tensor([0, 1]))
    assert split(batch)[1][0].data_ptr() == batch[0][1].data_ptr()


def test_cast_changes_floating_point_entries_only():
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long), "x": torch.ones(1, 2), "mask": torch.ones(1, 2).bool()}
    moved = cast([batch], dtype=torch.float64, device="cpu")[0]
    assert [moved[key].dtype for key in batch] == [torch.int64, torch.float64, torch.bool]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "the batch is empty: a list of no batches"),
        ({}, "holds no tensor"),
        ({"input_ids": [[1, 2]]}, "holds no tensor"),
        ({"input_ids": torch.ones(0, 3)}, r"is empty: .* \(0, 3\)"),
        ({"input_ids": torch.ones(3, 0)}, r"is empty: .* \(3, 0\)"),
        ({"input_ids": torch.ones(3, 2), "labels": torch.ones(2, 2)}, r"batch\['labels'\] has 2 rows, expected 3"),
        ((torch.ones(4, 2), torch.ones(3)), r"batch\[0\] has 4 rows, expected 3"),
    ],
)
def test_unusable_batches_are_value_errors_that_say_why(batch, message):
    with pytest.raises(ValueError, match=message):
        split(batch)


@pytest.mark.parametrize("batch", [None, torch.ones(2, 2), (torch.ones(2, 2),), "text", [torch.ones(2, 2)]])
def test_what_is_no_batch_is_a_type_error(batch):
    with pytest.raises(TypeError, match="a batch is a mapping of keyword arguments, a tuple"):
        split(batch)
