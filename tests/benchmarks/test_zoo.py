"""The sweep over public models is honest: what is wrong is marked so, what is right passes, what cannot be says why."""

import json
import resource
import signal
from dataclasses import replace

import pytest
import torch
from oracle import terms as terms_of_the_oracle
from torch import nn
from zoo import causal_batch, masked_batch, seq2seq_batch

import fisherfunc as ff
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.zoo import loop as looping
from benchmarks.zoo.__main__ import dead, main
from benchmarks.zoo.case import Case, NotTinyError, checked, perturbed
from benchmarks.zoo.judge import VERDICTS, Row, gram_errors, limit_this_process, verdict
from benchmarks.zoo.loop import loop, terms
from benchmarks.zoo.table import markdown, summary
from benchmarks.zoo.tiny import LAST_ID, VOCAB, tiny_config

BATCHES = {"causal_lm": causal_batch, "masked_lm": masked_batch, "seq2seq_lm": seq2seq_batch}


class Classifier(nn.Module):
    """Its forward pass raises `error` where that is set, and goes through `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.dtype, self.error = dtype, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self.last(self.inner(x).tanh().to(self.dtype).to(x.dtype))


def classified(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 4, dtype=torch.float64), "labels": torch.tensor([0, 2, 1, 1])}
    return Case(perturbed(Classifier(dtype)).double(), batch, "classification")


def test_the_command_marks_public_models_right_and_goes_on_where_it_ended(tmp_path, capsys):
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    arguments = ["--kind", "causal", "masked", "--only", "gpt2", "distilbert", "--rows", str(rows)]
    assert main([*arguments, "--table", str(table)]) == 0
    found = [Row(**json.loads(line)) for line in rows.read_text().splitlines()]
    assert [(row.kind, row.name, row.verdict) for row in found] == [
        ("causal", "gpt2", "right"),
        ("masked", "distilbert", "right"),
    ]
    assert all(row.tokens >= 5 and row.route == "factored" and row.error <= row.tolerance for row in found)
    assert "| gpt2 | GPT2LMHeadModel |" in table.read_text()
    assert "| all | 2 | 2 | 0 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b'"right"', b'"wrong"', 1))
    assert main(arguments) == 1  # of the rows that are there: nothing was run again
    assert rows.read_bytes() == before.replace(b'"right"', b'"wrong"', 1)


def test_shards_are_all_models_once(capsys):
    def listed(*arguments: str) -> list[str]:
        assert main(["--kind", "masked", "--list", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    whole = listed()
    parts = [listed("--shard", f"{number}/3") for number in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert len(whole) == len({*whole}) > 40


@pytest.mark.parametrize(
    "arguments", [["--shard", "4/3"], ["--shard", "x"], ["--kind", "causal", "--only", "no-such-model"]]
)
def test_what_cannot_be_run_is_said(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--list"])
    assert arguments[-1] in f"{ended.value} {capsys.readouterr().err}"


def test_the_same_gradients_are_right():
    case = classified()
    found = verdict(case, loop(case))
    assert (found["verdict"], found["route"]) == ("right", "factored")


def test_a_gradient_that_is_off_in_one_token_of_one_tensor_is_wrong():
    case = classified()
    truth = loop(case)
    gradients = {name: rows.clone() for name, rows in truth.gradients.items()}
    gradients["inner.bias"][2] *= 1 + 1e-9
    found = verdict(case, replace(truth, gradients=gradients))
    assert found["verdict"] == "wrong" and "inner.bias" in found["reason"]
    assert found["error"] > 1e-11


@pytest.mark.parametrize("kind", ["missing", "surplus", "not finite"])
def test_grams_of_other_tensors_or_that_are_not_finite_are_wrong(kind):
    case = classified()
    truth = loop(case)
    grams = {name: rows @ rows.T for name, rows in truth.gradients.items()}
    assert max(gram_errors(grams, truth).values()) == 0
    if kind == "missing":
        grams.pop("last.bias")
    else:
        grams["last.bias" if kind == "not finite" else "other"] = torch.full((4, 4), float("nan"))
    assert max(gram_errors(grams, truth).values()) == float("inf")


def test_the_tolerance_is_that_of_the_coarsest_dtype_inside():
    tolerances = {}
    for dtype in (torch.float64, torch.float32):
        case = classified(dtype)
        truth = loop(case)
        assert truth.dtype == dtype
        tolerances[dtype] = verdict(case, truth)["tolerance"] / torch.finfo(dtype).eps
    assert len({*tolerances.values()}) == 1


def test_an_error_of_ours_is_a_refusal_and_any_other_a_failure():
    case = classified()
    truth = loop(case)
    refused = verdict(Case(case.model, {**case.batch, "labels": torch.tensor([0, 2, 1, 7])}, case.loss), truth)
    assert refused["verdict"] == "refused" and "7" in refused["reason"]
    case.model.error = EOFError("something of the model's own")
    failed = verdict(case, truth)
    assert failed["verdict"] == "failed" and "something of the model's own" in failed["reason"]


@pytest.mark.parametrize("loss", BATCHES)
def test_the_tokens_are_those_of_the_oracle_of_the_tests(loss):
    torch.manual_seed(0)
    batch = BATCHES[loss]()
    assert terms(loss, batch) == [(t.sequence, t.position, t.target) for t in terms_of_the_oracle(loss, batch)]


def test_a_model_that_computes_without_end_is_over_time_and_one_that_dies_has_failed():
    with pytest.raises(DiedError) as died:
        in_fresh_process(_spin, limit_s=60)
    assert str(-signal.SIGXCPU) in str(died.value)
    assert dead("causal", "slow", 1, died.value).verdict == "over time"
    assert dead("causal", "dead", 1, DiedError("the process died with code -9")).verdict == "failed"


def _spin() -> None:
    limit_this_process(resource.RLIMIT_CPU, 1)
    while True:
        pass


def test_a_large_model_and_one_that_is_not_trained_are_not_tiny():
    assert checked(nn.Linear(4, 3), 15)
    with pytest.raises(NotTinyError, match="15 parameters"):
        checked(nn.Linear(4, 3), 14)
    with pytest.raises(NotTinyError, match="trained"):
        checked(nn.Linear(4, 3).requires_grad_(False))


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "t5"])
def test_a_tiny_configuration_keeps_each_kind_of_layer_and_ids_within_the_vocabulary(name):
    from transformers import CONFIG_MAPPING

    config, whole = tiny_config(name, CONFIG_MAPPING[name]), CONFIG_MAPPING[name]()
    assert {*(getattr(config, "layer_types", None) or ())} == {*(getattr(whole, "layer_types", None) or ())}
    assert 2 <= config.num_hidden_layers <= 4 and config.vocab_size == VOCAB > LAST_ID
    ids = [value for key, value in config.to_dict().items() if key.endswith("_token_id") and value is not None]
    assert ids and all(0 <= value < VOCAB for value in ids)


def test_the_summary_counts_every_row():
    rows = [Row(kind="causal", name=f"model{n}", verdict=verdict) for n, verdict in enumerate(VERDICTS)]
    assert "| all | 6 | 1 | 1 | 1 | 1 | 1 | 1 |" in summary(rows)
    shown = markdown([*rows, Row(kind="masked", name="other", verdict="refused", reason="a | b", error=2e-15)])
    assert "| all | 7 | 1 | 2 | 1 | 1 | 1 | 1 |" in shown and "| 2e-15 |" in shown and "a \\| b |" in shown


def test_the_loop_is_independent_of_fisherfunc():
    modules = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(looping).values()}
    assert "torch" in modules and not any(name.startswith(ff.__name__) for name in modules)
