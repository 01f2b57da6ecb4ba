"""Batches that can be read in two ways are read as the model does; what stays unclear is refused with both readings."""

import numpy as np
import pytest
import torch
from loops import CLASSES, assert_grams, class_losses, samples
from torch import nn

import fisherfunc as ff


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Lists, arrays and objects.


class SharedSet(set):
    """A set that the copies of a module have in common."""

    def __deepcopy__(self, memo):
        return self


class Scaled(nn.Module):
    """Each sample by its own number."""

    def __init__(self):
        super().__init__()
        self.layer, self.types = nn.Linear(5, CLASSES).double(), SharedSet()

    def forward(self, x, scale):
        self.types.add(type(scale))
        return self.layer(x) * torch.stack([torch.as_tensor(float(s)) for s in scale])[:, None].tanh()


class ScaledByFirst(Scaled):
    """All samples by the first number."""

    def forward(self, x, scale):
        self.types.add(type(scale))
        return self.layer(x) * float(scale[0])


KINDS = {"list": list, "tuple": tuple, "array": np.array, "text": lambda s: [str(n) for n in s]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_an_entry_a_sample_goes_to_its_sample_as_what_it_was(kind, count):
    model, (x, y), scale = Scaled(), samples(count), [0.5, 2.0, 1.0, 0.5, 3.0, 0.1][:count]
    batch = (x, KINDS[kind](scale), y)
    losses = class_losses(lambda b: model(x[b : b + 1], [scale[b]]), x, y)
    assert_grams(model, batch, losses)
    parts = [slice(0, 1), slice(1, None)] if count > 1 else [slice(0, 1)]
    assert_grams(model, [tuple(entry[part] for entry in batch) for part in parts], losses)
    assert model.types == {list, type(batch[1])}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_for_all_samples_goes_to_each_also_where_there_are_as_many(count):
    model, (x, y) = ScaledByFirst(), samples(count)
    losses = class_losses(lambda b: model(x[b : b + 1], [0.5]), x, y)
    assert_grams(model, (x, [0.5, 2.0], y), losses)
    assert_grams(model, [(x, [0.5, 2.0], y), (x[:2], [0.5, 2.0], y[:2])], losses + losses[:2])


def test_lists_of_other_lengths_that_no_reading_fits_are_refused_with_the_readings():
    x, y = samples(4)
    with pytest.raises(ValueError, match=r"batch\[1\] for all: the batch fails with RuntimeError"):
        ff.fisher_spectrum(Scaled(), (x, [0.5, 2.0], y))
    with pytest.raises(ValueError, match=r"batch\[0\] an entry a sequence: .* should it be a tensor\?"):
        ff.fisher_spectrum(nn.Linear(5, 3).double(), (x.numpy(), y))
    with pytest.raises(ValueError, match=r"batch\[0\]\[0\] is str.*has the text been through the tokenizer\?"):
        ff.fisher_spectrum(nn.Linear(5, 3).double(), (["a", "b", "c", "d"], y))


class Pooled(nn.Module):
    """A list of tensors, one a sample, of any length."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, CLASSES).double()

    def forward(self, images):
        return torch.stack([self.layer(image.mean(0).tanh()) for image in images])


@pytest.mark.parametrize("lengths", [(2, 3, 4), (3, 3, 3), (1, 1), (2, 2)])
def test_a_list_of_a_tensor_a_sample_is_divided_by_samples(lengths):
    model, y = Pooled(), samples(len(lengths))[1]
    images = [torch.randn(length, 5).double() for length in lengths]
    assert_grams(model, (images, y), class_losses(lambda b: model([images[b]]), images, y))


def test_a_list_of_a_tensor_an_input_is_divided_inside():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, CLASSES).double()

        def forward(self, pair):
            return self.layer(pair[0]) + self.layer(pair[1]).square()

    model, (x, y) = Two(), samples(2)
    pair = [x, x.flip(1)]
    assert_grams(model, (pair, y), class_losses(lambda b: model([p[b : b + 1] for p in pair]), x, y))


# Samples without an axis of samples.


class Graph(nn.Module):
    """A graph's class, from its nodes and edges: with an axis of samples, or without."""

    def __init__(self, axis):
        super().__init__()
        self.layer, self.axis = nn.Linear(5, CLASSES).double(), axis

    def forward(self, nodes, edges):
        hidden = torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]) + nodes
        logits = self.layer(hidden.tanh()).mean(0)
        return logits[None] if self.axis else logits


@pytest.mark.parametrize("axis", [True, False])
@pytest.mark.parametrize("scalar", [True, False])
def test_a_graph_a_batch_needs_no_axis_of_samples(axis, scalar):
    model, y = Graph(axis), samples(4)[1]
    graphs = [(torch.randn(3 + b % 2, 5).double(), torch.randint(3, (2, 4))) for b in range(4)]
    batch = [(*graph, y[b] if scalar else y[b : b + 1]) for b, graph in enumerate(graphs)]
    assert_grams(model, batch, class_losses(lambda b: model(*graphs[b]).reshape(1, -1), graphs, y))


@pytest.mark.parametrize("target", [lambda t: t, int])
def test_the_samples_of_a_dataset_are_a_batch(target):
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), samples()
    losses = class_losses(lambda b: model(x[b : b + 1]), x, y)
    assert_grams(model, [(one, target(its)) for one, its in zip(x, y, strict=True)], losses)


def test_a_sample_that_two_readings_fit_is_refused():
    class Standardised(nn.Module):  # over axis 0: of a sample's entries, or of samples
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, CLASSES).double()

        def forward(self, x):
            return self.layer(x - x.mean(0))

    x, y = samples()
    with pytest.raises(ValueError, match=r"with an axis of samples before their own and .* its predictions differ"):
        ff.fisher_spectrum(Standardised(), (x[0], y[0]))


def test_one_target_for_several_samples_is_refused_with_what_was_tried():
    x, y = samples()
    with pytest.raises(ValueError, match=r"a sample without an axis of samples\? The model does not take it so: .*"):
        ff.fisher_spectrum(nn.Linear(5, 3).double(), (x, y[:1]))


# Modules whose samples lie along another axis.


class TimeFirst(nn.Module):
    def __init__(self, inner, transposed):
        super().__init__()
        self.inner, self.out, self.transposed = inner.double(), nn.Linear(4, CLASSES).double(), transposed

    def forward(self, x):
        hidden = self.inner(x.transpose(0, 1) if self.transposed else x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.out(hidden.transpose(0, 1) if self.transposed else hidden)


INNER = {
    "rnn": lambda: nn.RNN(4, 4),
    "lstm": lambda: nn.LSTM(4, 4),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 1),
}


@pytest.mark.parametrize("name", INNER)
def test_time_along_axis_0_is_refused_by_the_name_of_the_module(name):
    model, x, y = TimeFirst(INNER[name](), False), torch.randn(5, 2, 4).double(), torch.randint(3, (5, 2))
    with pytest.raises(ValueError, match=r"modules with batch_first=False \(inner.*, whose axis 0 is time"):
        ff.fisher_spectrum(model, (x, y))
    transposed = TimeFirst(INNER[name](), True)
    assert ff.fisher_spectrum(transposed, (x, y)).full.num_tokens == 10
