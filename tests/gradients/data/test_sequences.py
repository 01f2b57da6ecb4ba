"""Batches of any kind as sequences: nothing lost, nothing mixed."""

from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.gradients.data.batches import cast
from fisherfunc.gradients.data.sequences import one_by_one, split
from fisherfunc.records.hashing import hash_of


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_concatenating_the_sequences_gives_the_batches_back(sizes, length):
    batches = [{"input_ids": torch.randint(9, (size, length)), "extra": (torch.rand(size, 2),)} for size in sizes]
    sequences = split(batches)
    assert len(sequences) == sum(sizes)
    assert torch.equal(torch.cat([s["input_ids"] for s in sequences]), torch.cat([b["input_ids"] for b in batches]))
    assert torch.equal(torch.cat([s["extra"][0] for s in sequences]), torch.cat([b["extra"][0] for b in batches]))


def batches_of(sizes, length):
    """Batches with something to slice, a row for all, and what is no tensor."""
    shared = torch.arange(length)[None]
    return [
        {
            "input_ids": torch.randint(9, (size, length)),
            "extra": (torch.rand(size, 2), torch.tensor(2.0)),
            "p": shared,
            "n": "x",
        }
        for size in sizes
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_joined_sequences_are_their_rows(sizes, length, data):
    sequences = split(batches_of(sizes, length))
    members = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=6, unique=True))
    together = sequences.joined(members)
    for b, member in enumerate(members):
        one = sequences[member]
        assert torch.equal(together["input_ids"][b : b + 1], one["input_ids"])
        assert torch.equal(together["extra"][0][b : b + 1], one["extra"][0])
        assert torch.equal(together["p"], one["p"]) and together["extra"][1] == 2 and together["n"] == "x"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_the_hash_is_that_of_the_list_of_sequences(sizes, length):
    batches = batches_of(sizes, length)
    sequences = split(batches)
    assert sequences.hash() == hash_of(list(sequences)) == one_by_one(list(sequences)).hash()
    before = sequences.hash()
    batches[-1]["extra"][0][-1, -1] += 1  # sequences are views
    assert sequences.hash() != before


def test_sequences_are_alike_where_their_tensors_have_one_shape():
    sequences = split([*batches_of([2, 1], 3), *batches_of([1], 4), {"input_ids": torch.ones(1, 3)}])
    assert [sequences.alike(0, other) for other in range(5)] == [True, True, True, False, False]


def test_each_sequence_comes_beside_its_row():
    sequences = split(batches_of([2, 1, 3], 3))
    column = torch.arange(12).reshape(6, 2)
    for number, (sequence, row) in enumerate(sequences.beside(column)):
        assert torch.equal(sequence["input_ids"], sequences[number]["input_ids"])
        assert torch.equal(row, column[number : number + 1])


def test_a_list_of_lists_of_batches_will_do():
    batches = batches_of([2, 1, 3], 3)
    assert split([batches[:2], batches[2]]).hash() == split(batches).hash()


def test_the_largest_sequence_is_the_one_of_most_numbers():
    sequences = split([*batches_of([2], 3), *batches_of([1], 4)])
    assert [sequences.num_entries(number) for number in range(3)] == [3 + 2 + 1 + 3] * 2 + [4 + 2 + 1 + 4]


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
