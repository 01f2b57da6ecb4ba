"""Bad input: a clear error that names what, where, and the way out; before any expensive work."""

import pytest
import torch
from odd_modules import Body, perceptron, samples
from torch import nn
from zoo import TinyLSTM, build

import fisherfunc as ff


def gpt2(**changes):
    model, batch = build("gpt2")
    batch = {**batch, **changes}
    return model, {key: value for key, value in batch.items() if value is not None}


def ids(*shape):
    return torch.ones(shape, dtype=torch.long)


IMPOSSIBLE = {
    "no valid token": (lambda: gpt2(labels=ids(3, 6) * -100), r"no valid token in 3 sequences: .* -100"),
    "one token": (
        lambda: gpt2(input_ids=ids(1, 1), labels=None, attention_mask=None),
        "at least two tokens a sequence",
    ),
    "nothing attended": (lambda: gpt2(attention_mask=ids(3, 6) * 0), "no valid token in 3 sequences"),
    "empty batch": (lambda: gpt2(input_ids=ids(0, 6), labels=None, attention_mask=None), r"is empty: .*\(0, 6\)"),
    "no batch": (lambda: (build("gpt2")[0], []), "the batch is empty: a list of no batches"),
    "empty sequences": (lambda: gpt2(input_ids=ids(3, 0), labels=None, attention_mask=None), r"is empty: .*\(3, 0\)"),
    "no input_ids": (lambda: gpt2(input_ids=None), "input_ids"),
    "no targets": (lambda: gpt2(input_ids=None, labels=None), "'input_ids' in the batch, got keys .*attention_mask"),
    "target too large": (
        lambda: gpt2(labels=ids(3, 6) * 40),
        "target 40 at sequence 0, position 0 .* expected 0 to 36",
    ),
    "target negative": (lambda: gpt2(labels=ids(3, 6) * -5), "target -5 at sequence 0, position 0 is out of range"),
    "id too large": (lambda: gpt2(input_ids=ids(3, 6) * 99), "sequence 0 with IndexError.*beyond the vocabulary"),
    "too long": (
        lambda: gpt2(input_ids=ids(1, 20), labels=None, attention_mask=None),
        "longer than the position table",
    ),
    "rows differ": (lambda: gpt2(labels=ids(2, 6)), r"batch\['labels'\] has 2 rows, expected 3"),
    "mask too short": (
        lambda: gpt2(attention_mask=ids(3, 5)),
        r"attention_mask has shape \(1, 5\), the targets \(1, 6\)",
    ),
    "labels too long": (
        lambda: gpt2(labels=ids(3, 7), attention_mask=None),
        r"sequence 0 has predictions of shape \(1, 5, 37\) and targets of shape \(1, 6\)",
    ),
    "ids of one axis": (
        lambda: gpt2(input_ids=ids(3), labels=None, attention_mask=None),
        r"targets of shape \(sequences, positions\), got \(1,\)",
    ),
    "regression of another width": (
        lambda: (perceptron(), (samples()[0], torch.ones(4, 2).double())),
        r"predictions of shape \(1, 1, 3\) and targets of shape \(1, 1, 2\)",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_batch_is_a_value_error_that_names_the_trouble(case):
    make, message = IMPOSSIBLE[case]
    model, batch = make()
    with pytest.raises(ValueError, match=message):
        ff.fisher_spectrum(model, batch)


def test_float_class_targets_are_refused():
    with pytest.raises(
        ValueError, match=r"expected class targets, which are integers, got torch\.float64 of shape .* with fractions"
    ):
        ff.fisher_spectrum(perceptron(), (samples()[0], torch.ones(4).double() / 2), loss=ff.losses.classification())


def test_a_missing_argument_of_a_model_of_your_own_is_named():
    with pytest.raises(
        TypeError, match=r"TinyLSTM does not take this batch \(missing a required argument: 'input_ids'"
    ):
        ff.fisher_spectrum(TinyLSTM(), {"labels": ids(1, 3)}, loss=ff.losses.causal_lm())


class Spoiled(nn.Module):
    """Loss NaN where the first input is above 10; gradient of `root` NaN where it is above 0, though unused there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.root = nn.Linear(5, 3), nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x):
        bad = torch.where(x[:, :1] > 10, torch.nan, 0.0)
        root = torch.where(x[:, :1] > 0, self.root.abs().sqrt() * 0, torch.zeros(3).double())
        return self.layer(x) + root + bad if bool((x[:, 0] > 0).any()) else self.layer(x) + 0 * self.root


def spoiled(*first):
    x = samples()[0][: len(first)]
    x[:, 0] = torch.tensor(first)
    return Spoiled(), (x, torch.tensor([0, 1, 2, 1])[: len(first)])


def test_a_loss_that_is_not_finite_is_located():
    with pytest.raises(
        ValueError, match=r"loss is nan at sequence 2, position 0 \(1 such tokens of 4\); drop_nonfinite"
    ):
        ff.fisher_spectrum(*spoiled(-1.0, -1.0, 11.0, -1.0))


@pytest.mark.parametrize("function", ["token_grams", "per_token_gradients"])
def test_a_gradient_that_is_not_finite_is_located_with_its_parameter(function):
    model, batch = spoiled(-1.0, 1.0, -1.0)
    fn = ff.functionalize(model)
    with pytest.raises(
        ValueError, match=r"gradient of sequence 1, position 0 by parameter 'root' is not finite .*1 such"
    ):
        getattr(ff, function)(fn, fn.params, batch, ff.losses.classification())


def test_tokens_that_are_not_finite_are_dropped_and_counted_on_request():
    model, (x, y) = spoiled(-1.0, 11.0, 1.0, -1.0)
    result = ff.fisher_spectrum(model, (x, y), drop_nonfinite=True)
    keep = torch.tensor([0, 3])
    clean = ff.fisher_spectrum(model, (x[keep], y[keep]))
    assert result.metadata["dropped_tokens"] == 2 and result.full.num_tokens == 2
    torch.testing.assert_close(result.full.eigenvalues, clean.full.eigenvalues, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("first", "what"), [((11.0, 12.0), "loss"), ((1.0, 2.0), "gradient")])
def test_dropping_every_token_is_an_error(first, what):
    model, batch = spoiled(*first)
    with pytest.raises(ValueError, match=f"the {what} of all 2 tokens is not finite"):
        ff.fisher_spectrum(model, batch, drop_nonfinite=True)


def test_nan_weights_are_found_before_any_gradient():
    model, batch = perceptron(), samples()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"loss is nan at sequence 0, position 0 \(4 such tokens of 4\)"):
        ff.fisher_spectrum(model, batch)


class WithoutGradient(Body):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (WithoutGradient, ff.losses.classification()),
        (Body, lambda output, batch: output.detach().sum(-1)),
        (Body, lambda output, batch: output.argmax(-1).double()),
    ],
)
def test_losses_that_no_gradient_passes_through_are_an_error_not_zeros(make, loss):
    with pytest.raises(ValueError, match=r"no gradient reaches any of the 4 parameters, such as 'layer\.weight'"):
        ff.fisher_spectrum(make().double(), samples(), loss=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens expected at least 1, got num_tokens=0"),
        ({"chunk_size": -1}, "chunk_size expected at least 1, got chunk_size=-1"),
        ({"unit": "word"}, "unit expected 'token' or 'sequence', got unit='word'"),
        ({"route": "magic"}, "route expected one of .*, got route='magic'"),
        ({"dtype": torch.int32}, "expected a floating-point dtype .*, got torch.int32"),
        ({"max_coordinates": 0}, "max_coordinates expected at least 1, got 0"),
        ({"parameters": []}, r"no parameter left of 4 with parameters=\[\]"),
        ({"parameters": "h.*"}, r"parameters='h\.\*' matches none of the 4 parameters, such as \['0.weight'"),
        (
            {"memory_limit": 1, "route": "dense"},
            r"memory_limit=1 bytes is below the \d+ bytes .* raise the limit or lower num_tokens",
        ),
        (
            {"loss": lambda output, batch: output.sum()},
            r"returned one number, reduced over tokens; expected losses \(b,\) or \(b, s\)",
        ),
    ],
)
def test_an_impossible_option_is_a_value_error_that_quotes_it(options, message):
    with pytest.raises(ValueError, match=message):
        ff.fisher_spectrum(perceptron(), samples(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 2.0}, "num_tokens expected an integer of at least 1, got num_tokens=2.0"),
        ({"chunk_size": "3"}, "chunk_size expected an integer of at least 1, got chunk_size='3'"),
        ({"max_coordinates": 2.5}, "max_coordinates expected an integer of at least 1, got 2.5"),
        ({"seed": None}, "seed expected an integer of 64 bits, got seed=None"),
        ({"seed": 2**70}, "seed expected an integer of 64 bits, got seed=1180591620717411303424"),
        ({"dtype": "float64"}, "expected a floating-point dtype .*, got 'float64'"),
        ({"device": "gpu"}, "device='gpu' cannot be used: Expected one of cpu"),
        ({"device": "meta"}, "device='meta' holds no values"),
        ({"clusters": [[1], [2], [3], [4]]}, r"clusters expected one label per sequence.* got \[1\]"),
        ({"memory_limit": 1e9}, "memory_limit expected a number of bytes, got 1000000000.0"),
    ],
)
def test_an_option_of_another_kind_is_refused_in_our_words(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ff.fisher_spectrum(perceptron(), samples(), **options)


def test_no_trainable_parameter_is_an_error_that_says_what_takes_all():
    with pytest.raises(ValueError, match="requires_grad is set on 0 of them; parameters='all' takes all"):
        ff.fisher_spectrum(perceptron().requires_grad_(False), samples())


@pytest.mark.parametrize("label", [3, None])
def test_a_block_rule_that_returns_no_string_is_a_type_error(label):
    with pytest.raises(TypeError, match=f"gave parameter '0.weight' the label {label} of type"):
        ff.fisher_spectrum(perceptron(), samples(), blocks=lambda name: label)


@pytest.mark.parametrize("function", ["token_grams", "per_token_gradients"])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params is empty"),
        ({"typo": torch.ones(3)}, "params has 'typo', which Sequential has not; it has .*'0.weight'"),
        ({"2.bias": torch.ones(4)}, r"params\['2.bias'\] has shape \(4,\), expected \(3,\)"),
    ],
)
def test_params_that_the_model_does_not_have_are_refused(function, params, message):
    fn = ff.functionalize(perceptron())
    with pytest.raises(ValueError, match=message):
        getattr(ff, function)(fn, params, samples(), ff.losses.classification())


def test_a_chunk_of_no_tokens_is_refused_for_rows_too():
    fn = ff.functionalize(perceptron())
    with pytest.raises(ValueError, match="chunk_size expected at least 1, got chunk_size=0"):
        ff.per_token_gradients(fn, fn.params, samples(), ff.losses.classification(), chunk_size=0)


def test_a_loss_that_cannot_be_inferred_lists_the_losses():
    with pytest.raises(ValueError, match=r"which loss Sequential was made for; pass loss=ff.losses.causal_lm\(\)"):
        ff.fisher_spectrum(perceptron(), {"input": samples()[0]})
