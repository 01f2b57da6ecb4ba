"""Packed rows: their documents are sequences of their own, whatever tells where one begins; or they are refused."""

from collections import namedtuple
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.data.batches import read
from fisherfunc.gradients.data.sequences import split

LENGTHS = (3, 1, 4)
IDS = torch.tensor([[5, 1, 2, 3, 4, 0, 6, 1]])
LABELS = torch.tensor([[-100, 1, 2, -100, -100, 0, 6, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
DOCUMENTS = torch.tensor([[7, 7, 7, 2, 9, 9, 9, 9]])
OFFSETS = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
TOLD = {
    "position_ids": {"position_ids": POSITIONS},
    "document_ids": {"document_ids": DOCUMENTS},
    "seq_idx": {"seq_idx": DOCUMENTS.int()},
    "offsets": {"cu_seqlens": OFFSETS, "max_seqlen": 4},
    "mask": {"attention_mask": torch.tensor([[1, 1, 1, 2, 3, 3, 3, 3]])},
    "collator": {
        "position_ids": POSITIONS,
        "seq_idx": DOCUMENTS,
        "cu_seq_lens_q": OFFSETS,
        "cu_seq_lens_k": OFFSETS,
        "max_length_q": 4,
        "max_length_k": 4,
    },
}


class Mixing(nn.Module):
    """A causal model in which every position reads all before it, of whatever document."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids, **others):
        return self.out(self.embedding(input_ids).cumsum(dim=1).tanh())


@pytest.fixture(scope="module")
def fn():
    torch.manual_seed(0)
    return ff.functionalize(Mixing().double())


def grams(fn, batch):
    return ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())


def by_hand():
    parts = zip(IDS.split(LENGTHS, dim=1), LABELS.split(LENGTHS, dim=1), strict=True)
    return [{"input_ids": ids, "labels": labels} for ids, labels in parts]


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_documents_have_the_grams_that_they_have_alone(fn, told):
    found, alone = grams(fn, {"input_ids": IDS, "labels": LABELS, **told}), grams(fn, by_hand())
    assert found.tokens.sequence.tolist() == alone.tokens.sequence.tolist() == [0, 0, 2, 2, 2]
    for name, gram in alone.grams.items():
        torch.testing.assert_close(found.grams[name], gram, rtol=1e-12, atol=1e-12 * float(gram.trace()))


def test_what_tells_documents_apart_goes_and_the_rest_stays():
    others = {"scale": torch.tensor(2.0), "use": None}
    first, _, third = read({"input_ids": IDS, "labels": LABELS, **others, **TOLD["collator"]})
    assert set(first) == {"input_ids", "labels", "scale", "use", "position_ids", "seq_idx"}
    assert third["position_ids"].tolist() == [[0, 1, 2, 3]] and third["seq_idx"].tolist() == [[9, 9, 9, 9]]
    assert read({"input_ids": IDS, **TOLD["mask"]})[1]["attention_mask"].tolist() == [[1]]


@given(
    lengths=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), left=st.booleans()
)
def test_padded_rows_of_documents_are_divided_where_they_were_joined(lengths, left):
    """Rows of several documents, padded on either side: every document comes out whole, with the pads at its side."""
    size = max(map(sum, lengths))
    rows = {"input_ids": [], "attention_mask": [], "position_ids": []}
    for number, of_row in enumerate(lengths):
        pads = [0] * (size - sum(of_row))
        held = {
            "input_ids": [100 * number + 10 * d + k for d, length in enumerate(of_row) for k in range(length)],
            "attention_mask": [1] * sum(of_row),
            "position_ids": [k for length in of_row for k in range(length)],
        }
        for name, values in held.items():
            filled = [1] * len(pads) if name == "position_ids" and left else pads  # as generate() fills them
            rows[name].append(filled + values if left else values + filled)
    found = split({name: torch.tensor(values) for name, values in rows.items()})
    seen = [one["input_ids"][one["attention_mask"] == 1].tolist() for one in found]
    plain = [
        [[100 * number + 10 * d + k for k in range(length)] for d, length in enumerate(of_row)]
        for number, of_row in enumerate(lengths)
    ]
    told = any(len(of_row) > 1 and max(of_row) > 1 for of_row in lengths)  # where positions are all alike, nothing is
    assert seen == [doc for row in plain for doc in (row if told else [list(chain(*row))])]


@pytest.mark.parametrize(
    "entries",
    [
        {"position_ids": torch.arange(8)[None]},
        {"position_ids": torch.zeros(1, 8, dtype=torch.long)},
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), "position_ids": POSITIONS.clamp(max=0)},
        {"document_ids": torch.ones(1, 8)},
        {"position_ids": torch.arange(24).reshape(3, 1, 8) % 4},
    ],
)
def test_a_row_of_one_document_is_left_as_it_is(entries):
    batch = {"input_ids": IDS, **entries}
    (found,) = read(batch)
    assert found.keys() == batch.keys() and all(found[key] is batch[key] for key in batch)


BACK = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5]])
HALVES = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"position_ids": BACK}, "go back from 3 to 2 at position 4, and begin with 0"),
        ({"position_ids": POSITIONS, "seq_idx": HALVES}, r"seq_idx has .* \[0, 4\], position_ids at \[0, 3, 4\]"),
        ({"cu_seqlens": OFFSETS[:-1]}, r"cu_seqlens is \[0, 3, 4\].*offsets that rise from 0 to 8"),
        ({"document_ids": DOCUMENTS, "labels": torch.tensor([1])}, r"labels \(shape \(1,\)\) has no entry for each"),
        ({"document_ids": DOCUMENTS, "words": ["a"]}, r"words \(list\) has no entry for each of the 8 positions"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(entries, message):
    with pytest.raises(ValueError, match=f"{message}.*pass a list with a batch for each document"):
        read({"input_ids": IDS, **entries})


def test_packed_rows_without_an_axis_or_a_mapping_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens, and input_ids without an axis of rows"):
        read({"input_ids": IDS[0], "cu_seqlens": OFFSETS})
    packed = namedtuple("Packed", "input_ids position_ids labels")(IDS, POSITIONS, LABELS)
    with pytest.raises(ValueError, match=r"named tuple Packed has packed rows, 3 documents in 1 row\(s\); pass a dict"):
        read(packed)


def test_masks_of_pairs_are_cut_on_both_axes():
    mask = (DOCUMENTS[0][:, None] == DOCUMENTS[0][None, :]).tril()[None, None]
    found = read({"input_ids": IDS, "document_ids": DOCUMENTS, "attention_mask": mask, "labels": LABELS})
    assert [one["attention_mask"].shape[2:] for one in found] == [(n, n) for n in LENGTHS]
    assert torch.equal(found[2]["attention_mask"][0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
