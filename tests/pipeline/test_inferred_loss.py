"""The loss where none is given: from a head's configuration, from the targets, and held against the model's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.losses import IGNORED
from fisherfunc.pipeline.inferred_loss import inferred_loss

transformers = pytest.importorskip("transformers")
VOCAB = 50


def small(config, **options):
    """A tiny configuration: whichever of these names it has."""
    sizes = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "dropout": 0.0}
    sizes |= dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 16)
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("intermediate_size", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 24)
    known = config().to_dict()
    return config(**{name: size for name, size in sizes.items() if name in known}, **options)


def model_of(name, config, **options):
    """In evaluation mode, with weights far enough from their start that no two losses are alike."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(small(getattr(transformers, config), **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def text(labels="ids", num=2, length=7):
    torch.manual_seed(1)
    ids = torch.randint(10, VOCAB, (num, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labels == "ids":
        batch["labels"] = ids.clone()
    elif labels == "masked":
        batch["labels"] = torch.full_like(ids, IGNORED)
        batch["labels"][:, [1, 4, 6]] = ids[:, [2, 3, 5]]
    elif labels is not None:
        batch["labels"] = labels
    return batch


HELD = {
    "GPT2LMHeadModel": ("GPT2Config", {}, "ids", "causal_lm"),
    "LlamaForCausalLM": ("LlamaConfig", {}, "ids", "causal_lm"),
    "BertForMaskedLM": ("BertConfig", {}, "masked", "masked_lm"),
    "XLMWithLMHeadModel": ("XLMConfig", {"n_langs": 1}, "masked", "masked_lm"),
    "FlaubertWithLMHeadModel": ("FlaubertConfig", {"n_langs": 1}, "masked", "masked_lm"),
    "BartForConditionalGeneration": ("BartConfig", {}, "ids", "seq2seq_lm"),
    "MarianMTModel": ("MarianConfig", {"decoder_start_token_id": 1}, "ids", "seq2seq_lm"),
    "BertForTokenClassification": (
        "BertConfig",
        {"num_labels": 7},
        torch.arange(14).reshape(2, 7) % 7,
        "classification",
    ),
    "BertForNextSentencePrediction": ("BertConfig", {}, torch.tensor([0, 1]), "classification"),
}
HEADS = {
    "single label": ({"num_labels": 3}, torch.tensor([2, 0]), "classification"),
    "two labels": ({"num_labels": 2}, torch.tensor([1, 0]), "classification"),
    "said to be single": (
        {"num_labels": 3, "problem_type": "single_label_classification"},
        torch.tensor([2, 0]),
        "classification",
    ),
    "said to be several": (
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        "binary_classification",
    ),
    "several by their labels": ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "binary_classification"),
    "one output": ({"num_labels": 1}, torch.tensor([0.3, 1.7]), "regression"),
    "one output, a column": ({"num_labels": 1}, torch.tensor([[0.3], [1.7]]), "regression"),
    "one output, whole numbers": ({"num_labels": 1}, torch.tensor([4, 1]), "regression"),
    "several outputs": (
        {"num_labels": 3, "problem_type": "regression"},
        torch.tensor([[0.3, 1.0, -2], [1.7, 0, 1]]),
        "regression",
    ),
}


def untouched(model):
    """Whatever a call could leave behind."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return model.training, state, str(model.config), {k: set(vars(m)) for k, m in model.named_modules()}


@pytest.mark.parametrize("name", HELD)
def test_a_head_of_transformers_has_the_loss_that_it_computes_itself(name, monkeypatch):
    config, options, labels, kind = HELD[name]
    model, batch = model_of(name, config, **options), text(labels)
    before = untouched(model)
    assert inferred_loss(model, batch).name == kind
    after = untouched(model)
    assert before[0] == after[0] and before[2:] == after[2:]
    assert all(torch.equal(value, after[1][key]) for key, value in before[1].items())
    monkeypatch.setattr(type(model), "forward", doubled(type(model).forward))
    with pytest.raises(ValueError, match=rf"inferred as ff.losses.{kind}\(\).*the model's own loss on them is"):
        inferred_loss(model, batch)  # so it was held, and not passed over


def doubled(forward):
    def call(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output if output.loss is None else type(output)(**{**output, "loss": 1.01 * output.loss})

    call.__signature__ = inspect.signature(forward)
    return call


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_a_head_of_samples_is_what_its_configuration_and_labels_say(name, head, monkeypatch):
    options, labels, kind = HEADS[name]
    model, batch = model_of(head, head.removesuffix("ForSequenceClassification") + "Config", **options), text(labels)
    assert inferred_loss(model, batch).name == kind
    assert model.config.problem_type == options.get("problem_type")
    monkeypatch.setattr(type(model), "forward", doubled(type(model).forward))
    with pytest.raises(ValueError, match="the model's own loss"):
        inferred_loss(model, batch)


def test_a_multi_label_head_with_a_mask_has_the_spectrum_of_a_loop():
    model = model_of(
        "BertForSequenceClassification", "BertConfig", num_labels=3, problem_type="multi_label_classification"
    )
    model, batch = model.double(), text(torch.tensor([[1.0, 0, 1], [0, 0, 1]]))
    rows = []
    for i in range(2):
        own = model(
            **{key: value[i : i + 1] for key, value in batch.items()} | {"labels": batch["labels"][i : i + 1].double()}
        )
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(3 * own.loss, model.parameters())]))
    want = torch.linalg.eigvalsh(torch.stack(rows) @ torch.stack(rows).mT / 2).flip(0)
    got = ff.fisher_spectrum(model, batch).full.eigenvalues
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("XLMWithLMHeadModel", "XLMConfig", {"n_langs": 1, "causal": True}),
        ("XLNetLMHeadModel", "XLNetConfig", {}),
        ("BartForCausalLM", "BartConfig", {}),
        ("PLBartForCausalLM", "PLBartConfig", {}),
        ("TrOCRForCausalLM", "TrOCRConfig", {}),
        ("WhisperForCausalLM", "WhisperConfig", {}),
    ],
)
def test_a_class_whose_own_loss_does_not_shift_is_not_shifted_in_silence(name, config, options):
    model, batch = model_of(name, config, **options), text("ids")
    with pytest.raises(ValueError, match=r"as ff\.losses\.masked_lm\(\) has it.*loss=ff\.losses\.causal_lm\(\), or"):
        inferred_loss(model, batch)
    output = model(**batch)
    assert ff.losses.masked_lm().values(output, batch).mean().item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_a_loss_that_is_given_is_not_held_against_the_models():
    model, batch = model_of("BartForCausalLM", "BartConfig"), text("ids")
    assert ff.fisher_spectrum(model, batch, loss=ff.losses.causal_lm(), num_tokens=2).full.num_tokens == 2


def test_every_door_holds_the_loss_against_the_model():
    model, batch = model_of("BartForCausalLM", "BartConfig"), text("ids")
    for door in (ff.fisher_spectrum, ff.plan, ff.fisher_eigenvectors):
        with pytest.raises(ValueError, match="the model's own loss"):
            door(model, batch)
    with pytest.raises(RuntimeError, match="the model's own loss"):
        ff.SpectrumRecorder(batch)(model, 0)


def test_padding_and_holes_are_set_aside_before_losses_are_compared():
    model, batch = model_of("GPT2LMHeadModel", "GPT2Config"), text("ids")
    batch["attention_mask"][:, :2] = 0  # its own loss counts these, unless their labels say otherwise
    batch["labels"][:, 4] = IGNORED
    assert inferred_loss(model, batch).name == "causal_lm"


def test_a_sequence_without_a_token_is_passed_over():
    model, batch = model_of("BartForCausalLM", "BartConfig"), text("ids", num=3)
    batch["labels"][:2] = IGNORED
    with pytest.raises(ValueError, match=r"valid token\(s\) of sequence 2 is"):
        inferred_loss(model, batch)


def test_without_labels_there_is_nothing_to_compare():
    assert inferred_loss(model_of("BartForCausalLM", "BartConfig"), text(None)).name == "causal_lm"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_compared_as_well_as_they_can_be(dtype):
    assert inferred_loss(model_of("GPT2LMHeadModel", "GPT2Config").to(dtype), text("ids")).name == "causal_lm"
    with pytest.raises(ValueError, match="the model's own loss"):
        model = model_of("BartForCausalLM", "BartConfig").to(dtype)
        inferred_loss(model, text("ids"))


class Own(nn.Module):
    """A model with a loss of its own: 0.7 of the cross-entropy, where it is told so."""

    def __init__(self, part=1.0, gives=lambda loss, logits: {"loss": loss, "logits": logits}):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.part, self.gives = nn.Linear(2, 3), part, gives

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return self.gives(None if labels is None else self.part * F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
@pytest.mark.parametrize(
    "gives",
    [
        lambda loss, logits: {"loss": loss, "logits": logits},
        lambda loss, logits: (logits,) if loss is None else (loss, logits),
        lambda loss, logits: (logits, loss),
    ],
    ids=["dict", "loss first", "loss last"],
)
def test_any_model_that_takes_labels_and_returns_a_loss_is_asked(kind, gives):
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])
    batch = (x, y) if kind == "tuple" else {"x": x, "labels": y}
    assert inferred_loss(Own(1.0, gives), batch).name == "classification"
    with pytest.raises(ValueError, match=r"loss of Own is inferred as ff.losses.classification\(\)"):
        inferred_loss(Own(0.7, gives), batch)


def test_a_model_may_sum_its_loss_over_tokens(monkeypatch):
    def summed(self, input_ids=None, labels=None, **inputs):
        output = forward(self, input_ids=input_ids, labels=labels, **inputs)
        return (
            output if labels is None else type(output)(**{**output, "loss": output.loss * (labels[:, 1:] >= 0).sum()})
        )

    model, batch = model_of("GPT2LMHeadModel", "GPT2Config"), text("ids")
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", summed)
    assert inferred_loss(model, batch).name == "causal_lm"


def test_a_loss_that_cannot_be_computed_says_nothing():
    def fails(loss, logits):
        if loss is not None:
            raise KeyError("needs more")
        return logits

    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])
    for gives in (fails, lambda loss, logits: logits, lambda loss, logits: {"loss": None, "logits": logits}):
        assert inferred_loss(Own(0.7, gives), (x, y)).name == "classification"
    assert inferred_loss(Own(float("nan")), (x, y)).name == "classification"


def test_soft_labels_of_a_classifier_are_refused_with_both_readings():
    model = model_of("BertForSequenceClassification", "BertConfig", num_labels=3)
    with pytest.raises(ValueError, match=r"classifier of 3 labels.*CrossEntropyLoss.*BCEWithLogitsLoss"):
        ff.fisher_spectrum(model, text(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])))
