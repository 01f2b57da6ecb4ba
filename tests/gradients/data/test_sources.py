"""What gives batches one after the other: read like a list of them, only as far as is needed, which is said."""

from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fisherfunc as ff
from fisherfunc.gradients.data.batches import read
from fisherfunc.pipeline.leading import leading_spectrum

X, Y = torch.arange(24.0).reshape(12, 2) / 10, torch.tensor([0, 1, 2] * 4)
LOSS = ff.losses.classification()


class Batches:
    """Batches of two rows, as long as they are asked for; it counts what was pulled."""

    def __init__(self, most=None):
        self.most, self.pulled = most, 0

    def __iter__(self):
        for number in count() if self.most is None else range(self.most):
            self.pulled += 1
            at = 2 * number % 12
            yield [X[at : at + 2], Y[at : at + 2]]


class Rows(Dataset):
    def __init__(self):
        self.read = set()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.read.add(index)
        return X[index], Y[index]


class Endless(IterableDataset):
    def __iter__(self):
        return ((X[k % 12], Y[k % 12]) for k in count())


@dataclass
class Table:
    """A stand-in for a data set of the library `datasets`: its attributes, and rows of plain Python values."""

    rows: list
    endless: bool = False
    features = None

    @property
    def column_names(self):
        return list(self.rows[0])

    def with_format(self, kind):
        raise NotImplementedError

    def __iter__(self):
        return (dict(self.rows[k % len(self.rows)]) for k in (count() if self.endless else range(len(self.rows))))


class Sized(Table):
    def __len__(self):
        return len(self.rows)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Linear(2, 3)


@pytest.fixture(scope="module")
def fn(model):
    return ff.functionalize(model)


ROWS = [{"input": x.tolist(), "label": int(y)} for x, y in zip(X, Y, strict=True)]
SOURCES = {
    "iterable": lambda: Batches(6),
    "endless": Batches,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=2),
    "loader of a stream": lambda: DataLoader(Endless(), batch_size=2),
    "ragged loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "data set": lambda: Sized(ROWS),
    "streamed data set": lambda: Table(ROWS, endless=True),
}
TAKEN = {
    "iterable": (2, 4, None),
    "endless": (2, 4, None),
    "loader": (2, 4, 6),
    "loader of a stream": (2, 4, None),
    "ragged loader": (1, 5, 3),
    "data set": (4, 4, 12),
    "streamed data set": (4, 4, None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_gives_the_first_tokens_that_are_needed_at_every_door(name, model, fn):
    """Four tokens of a source are those of the first rows that hold four, at each function that takes a batch."""
    batches, rows, of = TAKEN[name]
    plain: Any = {"input": X[:rows], "labels": Y[:rows]} if "data set" in name else (X[:rows], Y[:rows])
    source = SOURCES[name]()
    result = ff.fisher_spectrum(model, source, num_tokens=4)
    expected = ff.fisher_spectrum(model, plain, num_tokens=4)
    assert torch.equal(result.full.eigenvalues, expected.full.eigenvalues)
    assert result.metadata["batch"] == expected.metadata["batch"]
    assert (result.metadata["data"]["num_batches"], result.metadata["data"]["of_batches"]) == (batches, of)
    assert "data" not in expected.metadata
    grams = ff.token_grams(fn, fn.params, source, LOSS, num_tokens=4)
    assert torch.equal(grams.summed().matrix, ff.token_grams(fn, fn.params, plain, LOSS, num_tokens=4).summed().matrix)
    assert grams.metadata["data"] == result.metadata["data"]
    norms = ff.gradient_norms(fn, fn.params, source, LOSS, num_tokens=4)
    torch.testing.assert_close(norms, grams.summed().matrix.diagonal(), rtol=1e-5, atol=0)
    operator = ff.operators.fisher(fn, fn.params, source, LOSS, num_tokens=4)
    assert operator.num_rows == 4 and operator.metadata["data"] == grams.metadata["data"]
    plan = ff.plan(model, source, num_tokens=4, calibrate=False)
    again = ff.fisher_spectrum(model, source, num_tokens=4, plan=plan)
    assert torch.equal(again.full.eigenvalues, result.full.eigenvalues)
    leading = leading_spectrum(model, source, num_tokens=4, num_leading=1, num_probes=0)
    assert leading.metadata["data"] == grams.metadata["data"]


def test_directions_read_as_much_of_a_source_as_the_grams_did(fn):
    grams = ff.token_grams(fn, fn.params, Batches(), LOSS, num_tokens=4)
    found = ff.directions.eigenvectors(fn, fn.params, Batches(), LOSS, grams, num=1)
    plain = ff.directions.eigenvectors(fn, fn.params, (X[:4], Y[:4]), LOSS, grams, num=1)
    assert all(torch.equal(found.vectors[name], plain.vectors[name]) for name in plain.vectors)
    vectors = ff.fisher_eigenvectors(nn.Linear(2, 3), Batches(), num_tokens=4)
    assert vectors.vectors["weight"].shape == (1, 3, 2)


def test_no_more_is_pulled_than_is_needed(model):
    source, data = Batches(), Rows()
    ff.fisher_spectrum(model, source, num_tokens=7)
    assert source.pulled == 4  # four batches of two rows
    result = ff.fisher_spectrum(model, DataLoader(data, batch_size=2), num_tokens=3)
    assert data.read == {0, 1, 2, 3} and result.metadata["num_valid_tokens"] == 4


@pytest.mark.parametrize("name", ["iterable", "loader", "ragged loader", "data set"])
def test_without_a_number_of_tokens_all_is_read_and_nothing_is_said(name, model):
    result = ff.fisher_spectrum(model, SOURCES[name]())
    assert torch.equal(result.full.eigenvalues, ff.fisher_spectrum(model, (X, Y)).full.eigenvalues)
    facts = result.metadata["data"]
    assert facts["num_batches"] == facts["of_batches"] and "data:" not in str(result)


def test_the_screen_of_a_result_says_that_its_tokens_are_the_first_ones(model):
    result = ff.fisher_spectrum(model, SOURCES["loader"](), num_tokens=4)
    assert "the first 2 of 6 batches of a DataLoader, not spread over all of it" in str(result)
    assert "the first 4 rows of a datasets.Table, which may go on" in str(
        ff.fisher_spectrum(model, SOURCES["streamed data set"](), num_tokens=4)
    )


def test_tokens_that_do_not_count_are_not_counted(fn):
    class Masked:
        def __iter__(self):
            return iter(
                [(X[k : k + 3], Y[k : k + 3].where(torch.tensor([k > 2, True, False]), -100)) for k in (0, 3, 6)]
            )

    grams = ff.token_grams(fn, fn.params, Masked(), LOSS, num_tokens=2)
    assert grams.metadata["data"]["num_batches"] == 2 and grams.metadata["num_valid_tokens"] == 3


def test_batches_of_several_lengths_are_a_list_of_them(fn):
    class Ragged:
        def __iter__(self):
            return iter([[X[:1], Y[:1]], (X[1:6], Y[1:6]), [X[6:], Y[6:]]])

    found, plain = (ff.token_grams(fn, fn.params, batch, LOSS) for batch in (Ragged(), (X, Y)))
    torch.testing.assert_close(found.summed().matrix, plain.summed().matrix, rtol=1e-5, atol=1e-6)


def test_a_row_of_a_data_set_is_a_sequence_whatever_its_values_are_made_of():
    rows = [{"input_ids": [1, 2, 3], "weight": 0.5, "label": 1, "missing": None}]
    (one,) = read(Sized(rows))
    assert {name: (value.dtype, value.shape) for name, value in one.items()} == {
        "input_ids": (torch.int64, (1, 3)),
        "weight": (torch.float32, (1,)),
        "labels": (torch.int64, (1,)),
    }
    (other,) = read(Sized([{"input_ids": torch.tensor([1, 2, 3]), "label": torch.tensor(1)}]))
    assert torch.equal(other["input_ids"], one["input_ids"]) and torch.equal(other["labels"], one["labels"])


def once():
    yield X, Y


class SameIterator:
    def __init__(self):
        self.iterator = once()

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (once(), r"got generator, which can be read only once; pass a list .*list\(itertools.islice\("),
        (iter(DataLoader(TensorDataset(X, Y))), "which can be read only once; pass a list"),
        (SameIterator(), "the SameIterator gives one iterator each time.*pass a list of what it gives"),
        ({"train": Sized(ROWS), "test": Sized(ROWS)}, r"data sets \['train', 'test'\]; pass one: batch\['train'\]"),
        (Sized([{"text": "a", "label": 1}]), r"the column 'text' .* holds str.*remove_columns\(\['text'\]\)"),
        (Sized([{"ids": [[1], [2, 3]], "label": 1}]), r"the column 'ids' .* holds list, which makes no tensor"),
        ({1, 2}, "got set"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_next_step(given, message, model):
    with pytest.raises(TypeError, match=message):
        ff.fisher_spectrum(model, given, num_tokens=4)


def test_a_source_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="the Batches gives nothing"):
        ff.fisher_spectrum(model, Batches(0), num_tokens=4)


def test_pulling_from_a_loader_moves_no_random_generator(fn):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, generator=generator)
    before, own = torch.get_rng_state(), generator.get_state()
    ff.gradient_norms(fn, fn.params, loader, LOSS, num_tokens=3)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), own)


def test_a_list_is_still_picked_from_all_over(fn):
    """Of what lies in memory the tokens are picked by seed, as ever."""
    batches = list(islice(Batches(), 6))
    picked = ff.token_grams(fn, fn.params, batches, LOSS, num_tokens=4)
    assert picked.metadata["num_valid_tokens"] == 12 and "data" not in picked.metadata


@pytest.mark.parametrize("kind", ["samples", "stream", "dispatched"])
def test_a_loader_of_accelerate_that_repeats_samples_is_refused(kind):
    """Of one sample for two processes it makes a batch of four, on each of them: the same, so that nobody is missed."""
    data = Endless() if kind == "stream" else TensorDataset(X[:1], Y[:1])
    share = {"num_processes": 1 if kind == "dispatched" else 2, "process_index": 0, "put_on_device": False}
    loader = prepare_data_loader(DataLoader(data, batch_size=4), **share)
    if kind == "dispatched":  # rank 0 reads, and sends to each its share; this process by itself has no others
        assert len(next(iter(loader))[0]) == 1
        loader.state = type("State", (), {"num_processes": 2, "__module__": "accelerate.state"})()
    with pytest.raises(ValueError, match="is divided among 2 processes, and repeats samples"):
        read(loader)


def test_a_count_of_processes_of_ones_own_is_no_division():
    data = TensorDataset(X[:7], Y[:7])
    for data.num_processes in (8, None):
        assert sum(len(x) for x, _ in read(DataLoader(data, batch_size=2))) == 7


def test_a_loader_of_accelerate_that_repeats_nothing_is_read():
    data = TensorDataset(X[:7], Y[:7])
    options = {"num_processes": 2, "put_on_device": False, "even_batches": False}
    shares = [prepare_data_loader(DataLoader(data, batch_size=2), process_index=rank, **options) for rank in range(2)]
    inputs = torch.cat([batch[0] for share in shares for batch in read(share)])
    torch.testing.assert_close(inputs.sort(dim=0).values, X[:7].sort(dim=0).values, rtol=0, atol=0)
