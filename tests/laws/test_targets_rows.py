"""Rows of targets: which draws there are, what may be done with the rows of a token, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from true_fisher import exact_rows, grams_of, pass_rows
from zoo import build, token_ids

import fisherfunc as ff
from fisherfunc.gradients import grams as passes
from fisherfunc.gradients.rows.targets import chosen

CAUSAL = ff.losses.causal_lm()
SAMPLED, EXACT = ff.targets.sampled(2, seed=1), ff.targets.all_classes()


@pytest.fixture(scope="module")
def gpt2():
    """A model, its padded batch, and the Grams of two draws."""
    model, batch = build("gpt2", dtype=torch.float64)
    return model, batch, grams_of(model, batch, CAUSAL, targets=SAMPLED)


def assert_same(found, expected):
    assert torch.equal(found.tokens.target, expected.tokens.target)
    for name, k in expected.grams.items():
        assert_close(found.grams[name], k, rtol=1e-9, atol=1e-12 * float(expected.block().norm()))


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 5}, {"memory_limit": 600_000}, {"route": "dense"}],
    ids=["again", "chunks", "small memory", "dense"],
)
def test_the_same_seed_has_the_same_draws(gpt2, options):
    model, batch, grams = gpt2
    found = grams_of(model, batch, CAUSAL, targets=SAMPLED, **options)
    assert_same(found, grams)
    assert "memory_limit" not in options or found.metadata["passes"] > 1


def test_another_seed_has_other_draws(gpt2):
    model, batch, grams = gpt2
    found = grams_of(model, batch, CAUSAL, targets=ff.targets.sampled(2, seed=2), route="dense")
    assert not torch.equal(found.tokens.target, grams.tokens.target)


def test_draws_depend_on_nothing_but_the_sequence_the_position_and_their_number(gpt2):
    model, batch, grams = gpt2
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    split = grams_of(model, parts, CAUSAL, targets=SAMPLED, route="dense")
    assert_same(split, grams)
    padded = {key: nn.functional.pad(value, (0, 3), value=-100 * (key == "labels")) for key, value in batch.items()}
    assert torch.equal(
        grams_of(model, padded, CAUSAL, targets=SAMPLED, route="dense").tokens.target, grams.tokens.target
    )
    more = grams_of(model, batch, CAUSAL, targets=ff.targets.sampled(3, seed=1), route="dense")
    assert torch.equal(more.tokens.target[more.tokens.draw < 2], grams.tokens.target)
    few = grams_of(model, batch, CAUSAL, targets=SAMPLED, num_tokens=3, route="dense")
    pairs = {(s, p, d): t for s, p, d, t in zip(*(getattr(grams.tokens, c).tolist() for c in COLUMNS), strict=True)}
    chosen = list(zip(*(getattr(few.tokens, c).tolist() for c in COLUMNS), strict=True))
    assert few.num_units == 3 and len(chosen) == 6 and all(pairs[s, p, d] == t for s, p, d, t in chosen)


COLUMNS = ("sequence", "position", "draw", "target")


def test_tokens_are_those_of_the_observed_targets_and_n_is_their_number(gpt2):
    model, batch, grams = gpt2
    plain = grams_of(model, batch, CAUSAL, route="dense")
    for field in ("sequence", "position", "loss"):
        assert torch.equal(getattr(grams.tokens, field), getattr(plain.tokens, field).repeat_interleave(2))
    assert plain.tokens.draw is None and plain.tokens.target[0] == batch["labels"][0, 1]
    assert grams.num_units == plain.num_units == 8 and grams.num_rows == 16
    drawn, observed = ff.spectrum_of_grams(grams), ff.spectrum_of_grams(plain)
    assert drawn.full.num_tokens == drawn.block_diagonal.num_tokens == drawn.metadata["num_tokens"] == 8
    assert drawn.metadata["num_rows"] == 16 and drawn.metadata["mean_loss"] == pytest.approx(
        observed.metadata["mean_loss"], rel=1e-12
    )
    assert_close(drawn.full.eigenvalues, torch.linalg.eigvalsh(grams.block()).flip(0) / 8, rtol=1e-9, atol=1e-12)


def test_tokens_are_selected_whole(gpt2):
    grams = gpt2[2]
    some = grams.select(grams.tokens.sequence == 0)
    assert some.num_units == 5 and some.num_rows == 10
    assert torch.equal(some.block(), grams.block()[:10, :10]) and torch.equal(some.tokens.draw, torch.arange(10) % 2)
    twice = grams.select([0, 1, 0, 1, 4, 5])
    assert twice.num_units == 3
    for index in ([0], [0, 1, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"select expected all 2 rows of sequence 0, position \d or none"):
            grams.select(index)


def test_by_sequence_is_the_pass_over_sequences(gpt2):
    model, batch, grams = gpt2
    summed = grams.by_sequence()
    found = grams_of(model, batch, CAUSAL, targets=SAMPLED, unit="sequence", self_check=True)
    assert found.num_units == summed.num_units == 3 and found.num_rows == 6
    assert found.metadata["route"] == "factored"
    for name, k in summed.grams.items():
        assert_close(found.grams[name], k, rtol=1e-9, atol=1e-12 * float(summed.block().norm()))
    for field in ("sequence", "position", "draw", "loss"):
        assert_close(getattr(found.tokens, field), getattr(summed.tokens, field))
    assert found.metadata["num_summed_tokens"] == summed.metadata["num_summed_tokens"] == 8
    means = [ff.spectrum_of_grams(g, unit="sequence").metadata["mean_loss"] for g in (found, summed, grams)]
    assert means == pytest.approx([float(grams.tokens.loss.mean())] * 3, rel=1e-12)
    assert ff.spectrum_of_grams(found, unit="sequence").full.num_tokens == 3
    with pytest.raises(ValueError, match="all 2 rows of sequence 1 or none"):
        found.select([0, 1, 2])


def test_a_file_keeps_targets_and_draws(gpt2, tmp_path):
    grams = gpt2[2]
    grams.save(tmp_path / "grams.safetensors")
    loaded = ff.TokenGrams.load(tmp_path / "grams.safetensors")
    for field in COLUMNS:
        assert torch.equal(getattr(loaded.tokens, field), getattr(grams.tokens, field))
    assert loaded.num_units == 8 and loaded.fisher == "true (Monte-Carlo, 2 draws)"


class Squares(nn.Module):
    """Two classes, of probability 0.9 and 0.1: the gradient of the rarer one overflows at x = 4e19."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        first = ((self.weight * x) * x).sum(-1)
        return torch.stack([first, torch.full_like(first, -2.2)], dim=-1)


def test_a_token_without_a_finite_gradient_goes_with_all_of_its_rows():
    batch = (torch.tensor([[[1.0, 2.0], [4e19, 0.5]], [[2.0, 1.0], [0.5, 4.0]]]), torch.zeros(2, 2, dtype=torch.long))
    loss, targets = ff.losses.classification(class_axis=-1), ff.targets.sampled(8, seed=1)
    drawn, rows = pass_rows(Squares(), batch, loss, targets)
    finite = rows[8:16].isfinite().all(dim=1)
    assert torch.equal(finite, drawn.tokens.target[8:16] == 0) and finite.any() and not finite.all()
    for unit, units in (("token", 3), ("sequence", 2)):
        found = grams_of(Squares(), batch, loss, targets=targets, unit=unit, drop_nonfinite=True)
        assert found.num_units == units and found.num_rows == 8 * units
        assert found.metadata["dropped_tokens"] == 1 and found.block().isfinite().all()
    assert found.metadata["num_summed_tokens"] == 3
    count = int((~finite).sum())
    message = rf"gradient of sequence 0, position 1 by parameter 'weight' is not finite \({count} such rows of 32\)"
    with pytest.raises(ValueError, match=message):
        grams_of(Squares(), batch, loss, targets=targets)


def test_a_checkpoint_is_of_its_targets(gpt2, tmp_path):
    model, batch, grams = gpt2
    for _ in range(2):
        assert_same(grams_of(model, batch, CAUSAL, targets=SAMPLED, checkpoint=tmp_path), grams)
    for other in (None, ff.targets.sampled(2, seed=2), ff.targets.sampled(3, seed=1), EXACT):
        with pytest.raises(ValueError, match=r"is of another run; these differ: .*targets"):
            grams_of(model, batch, CAUSAL, targets=other, checkpoint=tmp_path)


def test_a_vocabulary_too_large_is_an_error_that_states_its_cost(monkeypatch):
    model, batch = build("gpt2")[0], {"input_ids": token_ids(2, 9)}

    monkeypatch.setattr(passes, "passed_by_route", None)  # no pass
    rows = 16 * 37
    pattern = rf"has {rows} rows, 16 tokens of 37 classes: .* bytes .*memory_limit is 1000000; .*targets\.sampled"
    fn = ff.functionalize(model)
    for run in (ff.fisher_spectrum, ff.plan):
        with pytest.raises(ValueError, match=pattern) as found:
            run(model, batch, targets=EXACT, memory_limit=10**6)
        num_grams = len(ff.partition(fn.params, ff.by_layer))
        assert str((num_grams + 1) * rows**2 * 8) in str(found.value)
    with pytest.raises(ValueError, match=pattern):
        ff.token_grams(fn, fn.params, batch, CAUSAL, targets=EXACT, memory_limit=10**6)


def test_a_loss_of_ones_own_has_no_predictive_distribution():
    model, batch = nn.Linear(2, 3), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
    for targets in (SAMPLED, EXACT):
        for run in (ff.fisher_spectrum, ff.plan):
            with pytest.raises(ValueError, match=r"loss 'mine' has distribution 'custom': no predictive distribution"):
                run(model, batch, loss=ff.losses.custom(lambda out, _: out.sum(-1), name="mine"), targets=targets)


def test_a_loss_that_is_not_what_it_says_is_refused():
    model, batch = nn.Linear(2, 3), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
    plain = ff.losses.classification()
    sharper = replace(plain, negative_log_likelihood=lambda x, y: plain.negative_log_likelihood(2 * x, y))
    for targets in (SAMPLED, EXACT):
        with pytest.raises(
            ValueError, match=r"has distribution 'categorical', and is .* where minus its log-likelihood"
        ):
            grams_of(model, batch, sharper, targets=targets)


@pytest.mark.parametrize("targets", [SAMPLED, EXACT], ids=["sampled", "all"])
def test_the_true_fisher_is_not_to_be_centred(gpt2, targets, monkeypatch):
    model, batch, _ = gpt2
    grams = grams_of(model, batch, CAUSAL, targets=targets, route="dense")
    monkeypatch.setattr(torch.autograd, "grad", None)  # what fails does so before the pass
    for attempt in (
        grams.center,
        lambda: ff.spectrum_of_grams(grams, center=True),
        lambda: ff.fisher_spectrum(model, batch, targets=targets, center=True),
    ):
        with pytest.raises(ValueError, match=r"expected gradient under the model's own distribution is zero exactly"):
            attempt()


def test_all_classes_of_a_sequence_are_not_to_be_summed(gpt2):
    model, batch, _ = gpt2
    grams = grams_of(model, batch, CAUSAL, targets=EXACT, route="dense")
    for attempt in (
        grams.by_sequence,
        lambda: ff.spectrum_of_grams(grams, unit="sequence"),
        lambda: ff.fisher_spectrum(model, batch, targets=EXACT, unit="sequence"),
        lambda: ff.plan(model, batch, targets=EXACT, unit="sequence"),
    ):
        with pytest.raises(
            ValueError, match=r"got all_classes: .*tokens over sequences; take unit='token', or .*sampled"
        ):
            attempt()


def test_samples_of_different_numbers_of_outputs_are_refused():
    def batch(width):
        return (torch.randn(1, width, 2), torch.randn(1, width))

    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten())
    for targets in (SAMPLED, EXACT):
        with pytest.raises(ValueError, match=r"different numbers of outputs|expected 2 classes everywhere, got 3"):
            grams_of(model, [batch(2), batch(3)], ff.losses.regression(), targets=targets)


def test_what_is_no_targets_is_refused():
    with pytest.raises(TypeError, match=r"targets=sampled is a factory; call it: targets=ff\.targets\.sampled\(\)"):
        chosen(ff.targets.sampled, unit="token")
    with pytest.raises(TypeError, match=r"targets expected ff\.targets\.observed.*got 'sampled'"):
        chosen("sampled", unit="token")
    with pytest.raises(ValueError, match="sampled expected num_draws >= 1, got num_draws=0"):
        ff.targets.sampled(0)


def test_a_selection_of_all_classes_is_of_whole_tokens(gpt2):
    model, batch, _ = gpt2
    grams = grams_of(model, batch, CAUSAL, targets=EXACT, route="dense")
    last = grams.select(grams.tokens.sequence == 2)
    rows = exact_rows(model, "causal_lm", {key: value[2:] for key, value in batch.items()})
    truth = sum(r @ r.T for r in rows.values())
    assert last.num_units == 1
    assert_close(last.block(), truth, rtol=1e-9, atol=1e-12 * float(truth.norm()))
