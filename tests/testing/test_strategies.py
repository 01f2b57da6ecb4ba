"""The strategies reach the edge cases that they promise, and their models are what they say."""

import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fisherfunc import testing

SEARCH = settings(max_examples=2000, deadline=None, database=None, derandomize=True)


def reaches(strategy, condition):
    """An example, not shrunk; an error where there is none."""
    return find(strategy, condition, settings=settings(SEARCH, phases=[Phase.generate]))


@pytest.mark.parametrize(
    "condition",
    [
        lambda g: g.shape == (1, 1) and bool(g.any()),
        lambda g: g.shape[0] > g.shape[1] > 1,
        lambda g: g.shape[1] > g.shape[0] > 1,
        lambda g: not g.any(),
        lambda g: min(g.shape) > 2 and 1 < torch.linalg.matrix_rank(g) < min(g.shape),
        lambda g: min(g.shape) > 2 and torch.linalg.matrix_rank(g) == min(g.shape),
        lambda g: len(g) > 2 and len(g.unique(dim=0)) == 2,
        lambda g: float(g.norm(dim=1).max()) > 1e12 * float(g.norm(dim=1).min()) > 0,
        lambda g: len(g) > 1 and g.numel() > 2 and len(g.unique()) == 1 and bool(g.any()),
    ],
    ids=["one", "tall", "wide", "zero", "deficient", "full", "duplicated", "badly scaled", "constant"],
)
def test_gradient_matrices_reach(condition):
    reaches(testing.gradient_matrices(), condition)


def test_gradient_matrices_shrink_to_the_fewest_zeros():
    smallest = find(testing.gradient_matrices(), lambda g: g.shape[0] > 1, settings=SEARCH)
    assert smallest.tolist() == [[0.0], [0.0]]


@given(testing.gradient_matrices(max_rows=3, max_columns=2, dtype=torch.float32))
def test_gradient_matrices_keep_to_their_bounds(rows):
    assert 1 <= rows.shape[0] <= 3 and 1 <= rows.shape[1] <= 2 and rows.dtype == torch.float32
    assert bool(rows.isfinite().all())


@given(testing.prescribed_spectra())
def test_prescribed_spectra_are_those_of_the_matrix(pair):
    rows, eigenvalues = pair
    fisher = rows.mT @ rows / len(rows)
    want = torch.zeros(rows.shape[1], dtype=torch.float64)
    want[: len(eigenvalues)] = eigenvalues
    got = torch.linalg.eigvalsh(fisher).flip(0)
    assert_close(got, want, atol=1e-13 * float(eigenvalues.max()), rtol=0)


def test_prescribed_spectra_reach_zeros_repeats_and_wide_ranges():
    reaches(
        testing.prescribed_spectra(), lambda pair: len(pair[1]) > 2 and 0 < int((pair[1] == 0).sum()) < len(pair[1])
    )
    reaches(testing.prescribed_spectra(), lambda pair: pair[1][0] > 1e6 * pair[1][-1] > 0)


def test_gradient_trees_reach_scalars_and_tensors_of_three_axes():
    reaches(testing.gradient_trees(), lambda tree: len(tree) > 1 and {1, 4} <= {g.ndim for g in tree.values()})


@given(testing.gradient_trees(max_rows=2, max_tensors=2))
def test_gradient_trees_have_one_number_of_rows(tree):
    assert len({len(g) for g in tree.values()}) == 1 and 1 <= len(tree) <= 2


def test_partitions_reach_one_block_and_one_block_a_name():
    names = ["a.w", "b.w", "c"]
    for count in (1, 2, 3):
        rule = reaches(testing.partitions(names), lambda rule, count=count: len({rule(n) for n in names}) == count)
        assert all(isinstance(rule(name), str) for name in names) and "c" in repr(rule)


def lengths(model):
    mask = model.batch.get("attention_mask", torch.ones_like(model.batch["input_ids"]))
    return mask.sum(dim=1).tolist()


@pytest.mark.parametrize(
    "condition",
    [
        lambda m: len(lengths(m)) == 1,
        lambda m: 1 in lengths(m),
        lambda m: len(set(lengths(m))) == 3,
        lambda m: m.module.lm_head.weight is m.module.embed.weight,
        lambda m: "attention_mask" not in m.batch and "labels" not in m.batch,
        lambda m: "labels" in m.batch and m.batch["labels"][0, 1] != -100 and bool((m.batch["labels"] == -100).any()),
        lambda m: "labels" in m.batch and len(set(lengths(m))) > 1 and not (m.batch["labels"] == -100).any(),
    ],
    ids=["batch of one", "one token", "unequal", "tied", "ids only", "holes", "labels at padding"],
)
def test_language_models_reach(condition):
    reaches(testing.language_models(), condition)


@given(testing.language_models())
def test_language_models_are_causal_deaf_to_padding_and_have_a_token(model):
    ids, mask = model.batch["input_ids"], model.batch.get("attention_mask")
    assert "labels" not in model.batch or model.batch["labels"][0, 1] != -100
    assert mask is None or bool(mask[0, :2].all())
    logits = logits_of(model.module(ids, mask))
    assert logits.shape[:2] == ids.shape and logits.dtype == torch.float64 and bool(logits.isfinite().all())
    for row, length in enumerate(lengths(model)):
        alone = logits_of(model.module(ids[row : row + 1, :length]))
        assert_close(logits[row, :length], alone[0], atol=1e-12, rtol=1e-12)
        prefix = logits_of(model.module(ids[row : row + 1, :1]))
        assert_close(logits[row, :1], prefix[0], atol=1e-12, rtol=1e-12)


def test_language_models_attend_to_no_masked_position():
    model = reaches(testing.language_models(), lambda m: max(lengths(m)) > 2)
    ids = model.batch["input_ids"]
    mask, other = torch.ones_like(ids), ids.clone()
    mask[:, 1] = 0
    other[:, 1] = (ids[:, 1] + 1) % model.module.embed.num_embeddings
    apart = [logits_of(model.module(which, mask))[:, 2:] for which in (ids, other)]
    assert_close(apart[0], apart[1], atol=0, rtol=0)
    assert not torch.equal(*(logits_of(model.module(which))[:, 2:] for which in (ids, other)))


def logits_of(output):
    return getattr(output, "logits", output)


@given(testing.classifiers() | testing.regressors())
def test_perceptrons_fit_their_batch(model):
    inputs, targets = model.batch
    output = model.module(inputs)
    assert len(output) == len(targets) and not model.module.training
    if targets.is_floating_point():
        assert targets.shape == output.shape and model.loss is None
    else:
        assert targets[0] != -100 and int(targets.max()) < output.shape[1]
        assert model.loss is None or model.loss(output, model.batch).shape == targets.shape


@pytest.mark.parametrize("repeats", [0, 1, 2])
def test_perceptrons_call_a_layer_never_once_or_twice(repeats):
    reaches(testing.classifiers(), lambda m: m.module.repeats == repeats and m.batch[0].shape[0] == 1)


def test_classifiers_reach_holes_losses_and_models_without_bias():
    reaches(testing.classifiers(), lambda m: bool((m.batch[1] == -100).any()))
    reaches(testing.classifiers(), lambda m: m.loss is not None and m.module.head.bias is None)


def test_tiny_models_are_of_every_kind():
    for kind in ("TinyPerceptron", "TinyForCausalLM"):
        reaches(testing.tiny_models(), lambda m, kind=kind: type(m.module).__name__ == kind)
    reaches(
        testing.tiny_models(dtype=torch.float32),
        lambda m: isinstance(m.batch, tuple) and m.batch[1].is_floating_point(),
    )


@given(st.data())
def test_drawing_a_model_leaves_the_global_random_state(data):
    before = torch.random.get_rng_state()
    data.draw(testing.tiny_models())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_hypothesis_the_error_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import fisherfunc.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and 'pip install "fisherfunc[test]"' in result.stderr.splitlines()[-1]
