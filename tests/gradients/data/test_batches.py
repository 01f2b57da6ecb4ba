"""What a user gives for a batch: every form of it is read as the same batches, or refused by name."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fisherfunc as ff
from fisherfunc.gradients.data.batches import cast, read
from fisherfunc.gradients.data.sequences import split
from fisherfunc.records.containers import flattened, mapped

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 1, 0, 2])
Named = namedtuple("Named", "input labels")


@dataclass(frozen=True)
class Fields:
    input: torch.Tensor
    labels: torch.Tensor


class Rows(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


FORMS = {
    "list": lambda: [X, Y],
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "list of a loader": lambda: list(DataLoader(TensorDataset(X, Y), batch_size=4)),
    "loader of rows": lambda: DataLoader(Rows(), batch_size=4),
    "array": lambda: (X, Y.numpy()),
    "numbers": lambda: (X, Y.tolist()),
    "named": lambda: Named(X, Y),
    "samples": lambda: list(TensorDataset(X, Y)),
    "samples with numbers": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
}
MAPPINGS = {
    "dataclass": lambda: Fields(X, Y),
    "user": lambda: UserDict(input=X, labels=Y),
    "ordered": lambda: OrderedDict(input=X, labels=Y),
    "proxy": lambda: MappingProxyType({"input": X, "labels": Y}),
    "array": lambda: {"input": X, "labels": Y.numpy()},
}


def grams(batch):
    torch.manual_seed(0)
    fn = ff.functionalize(nn.Linear(2, 3).double())
    return ff.token_grams(fn, fn.params, cast(batch, dtype=torch.float64, device=None), ff.losses.classification())


@pytest.mark.parametrize("make", [*FORMS.values(), *MAPPINGS.values()], ids=[*FORMS, *MAPPINGS])
def test_every_form_of_a_batch_has_the_grams_of_the_plain_one(make):
    torch.testing.assert_close(grams(make()).grams, grams((X, Y)).grams, rtol=1e-12, atol=1e-12)


def test_a_loader_moves_no_random_generator():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, generator=generator)
    before, own = torch.get_rng_state(), generator.get_state()
    read(loader)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), own)


@pytest.mark.parametrize("loader", [DataLoader(TensorDataset(X, Y), shuffle=True), DataLoader(Rows(), batch_size=None)])
def test_a_loader_is_read_where_its_order_is_fixed(loader):
    if isinstance(loader.dataset, IterableDataset):
        assert len(read(loader)) == 6
    else:
        with pytest.raises(ValueError, match=r"an order of its own \(RandomSampler\).*pass list\(loader\)"):
            read(loader)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"got Tensor without targets; pass \(inputs, targets\)"),
        (((X, Y) for _ in range(1)), "got generator, which can be read only once; pass a list"),
        (TensorDataset(X, Y), r"got TensorDataset; pass torch\.utils\.data\.DataLoader"),
        ({0: X, 1: Y}, r"a mapping with keys \[0, 1\], expected names of arguments"),
        ([1, 2], "got int"),
        ((pack_sequence([X[:1], X[1:2]]), Y[:2]), r"batch\[0\] is a packed sequence, .*; pass it padded"),
        ((X.to_sparse(), Y), r"batch\[0\] is sparse \(torch.sparse_coo\).*pass batch\[0\]\.to_dense\(\)"),
        ((torch.nested.nested_tensor([X[:2], X], layout=torch.jagged), Y[:2]), r"batch\[0\] is a nested tensor"),
    ],
)
def test_what_has_no_rows_is_a_type_error_with_a_way_out(batch, message):
    with pytest.raises(TypeError, match=message):
        split(batch)
    assert not isinstance(batch, Dataset) or len(batch) == 6


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X.to("meta"), Y), r"batch\[0\] is on the meta device"),
        ((torch.arange(11), torch.tensor([0, 3, 5]), Y[:3]), r"has 11 rows, expected 3 .* bags of ids, .* one each"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, r"holds no tensor.*return_tensors='pt'"),
    ],
)
def test_rows_that_do_not_fit_are_a_value_error_with_a_way_out(batch, message):
    with pytest.raises(ValueError, match=message):
        split(batch)


@pytest.mark.parametrize("inner", [UserDict(x=X), OrderedDict(x=X), Fields(X, X), Named(X, X), [X, [X]], {"x": (X,)}])
def test_what_holds_tensors_stays_what_it_is_and_is_divided_inside(inner):
    for number, (held, _) in enumerate(split((inner, Y))):
        assert type(held) is type(inner)
        assert [path for path, _ in flattened(held)] == [path for path, _ in flattened(inner)]
        assert all(torch.equal(leaf, X[number : number + 1]) for _, leaf in flattened(held))
    moved = cast((inner, Y), dtype=torch.float64, device=None)[0][0]
    assert type(moved) is type(inner) and all(leaf.dtype == torch.float64 for _, leaf in flattened(moved))


def test_a_function_of_the_leaves_leaves_the_tree_alone():
    tree = Fields(X, Y)
    assert mapped(lambda leaf: leaf + 1, tree).input.equal(X + 1) and tree.input.equal(X.clone())


@pytest.mark.parametrize(
    "values", [[3, 6, 2, 5, 1, 4], list("abcdef"), np.arange(6), [torch.full((7,), b) for b in range(6)]]
)
def test_the_hash_of_lists_and_arrays_is_that_of_their_entries(values):
    whole = split({"input_ids": X, "own": values})
    parts = split([{"input_ids": X[part], "own": values[part]} for part in (slice(0, 1), slice(1, 3), slice(3, 6))])
    assert whole.hash() == parts.hash()
    changed = [*values[:-1], values[0]]
    own = np.array(changed) if isinstance(values, np.ndarray) else changed
    assert whole.hash() != split({"input_ids": X, "own": own}).hash()


def test_samples_of_one_shape_that_are_taken_whole_are_not_joined():
    sequences = split([(torch.randn(3, 2), torch.tensor(1)) for _ in range(2)])
    assert not sequences.alike(0, 1)


def test_a_matrix_and_its_transpose_are_not_one_that_samples_share():
    """Graphs without an axis of samples, as a list of batches of one: the memory of both begins at the same place."""

    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x, edges):
            return (edges @ self.layer(x)).tanh().mean(1)

    torch.manual_seed(0)
    edges, model = torch.randn(4, 4), Convolved()
    graphs = [(torch.randn(1, 4, 2), matrix, torch.tensor([k])) for k, matrix in enumerate([edges, edges.T, edges])]
    copies = [(x, matrix.clone(), y) for x, matrix, y in graphs]
    found = [ff.fisher_spectrum(model, batch).full.eigenvalues for batch in (graphs, copies)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
    assert split(graphs).alike(0, 2) and not split(graphs).alike(0, 1)
