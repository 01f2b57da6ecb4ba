"""`fisherfunc check`: what it says of a model and a text is what a run finds."""

import json
from dataclasses import replace

import hf_folders
import pytest
import torch
from click.testing import CliRunner

import fisherfunc as ff
from fisherfunc.surface.cli import cli
from fisherfunc.surface.commands.check_command import coverage, exploits, findings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 whose tokenizer has a start token, and texts."""
    root = tmp_path_factory.mktemp("check")
    hf_folders.model("gpt2").save_pretrained(root / "gpt2")
    tokenizer = hf_folders.tokenizer("gpt2")
    tokenizer.add_special_tokens({"bos_token": "[CLS]"})
    tokenizer.save_pretrained(root / "gpt2")
    (root / "plain.txt").write_text(hf_folders.sentence(40))
    (root / "once.txt").write_text("[CLS] " + hf_folders.sentence(40))
    (root / "twice.txt").write_text("[CLS] [CLS] " + hf_folders.sentence(40))
    return root


def found(folder, text, **options):
    given = {"num_tokens": None, "context": 10, "dtype": "float32", **options}
    return dict(findings(model=str(folder / "gpt2"), text=str(folder / text), **given))


def test_the_screen_says_what_is_covered_and_how(folder):
    said = found(folder, "plain.txt", num_tokens=20)
    count = sum(p.numel() for p in hf_folders.model("gpt2").parameters())
    assert said["parameters"] == f"{count:,} of {count:,} in F (100.00%)" and "left out" not in said
    assert said["tied"].startswith("lm_head.weight: one parameter with another")
    assert said["text"].endswith("20 tokens in windows of 10 positions") and said["route"] == "factored"
    routes = [int(part.split(" by ")[0]) for part in said["gradients"].split(", ")]
    assert sum(routes) == len(list(hf_folders.model("gpt2").named_parameters()))
    assert "look at" not in said and "1e-14" in found(folder, "plain.txt", dtype="float64")["dtype"]


def test_a_text_that_is_too_short_and_two_start_tokens_are_told(folder):
    short = found(folder, "plain.txt", num_tokens=1000)["text"]
    assert "36 tokens in windows of 10 positions; the text is too short for 1,000" in short  # four windows of nine
    assert "two start tokens" in found(folder, "twice.txt")["look at"] and "look at" not in found(folder, "once.txt")


def test_frozen_parameters_are_counted_as_left_out():
    model = hf_folders.model("gpt2")
    total, left = sum(p.numel() for p in model.parameters()), model.transformer.wte.weight.numel()
    model.transformer.wte.requires_grad_(False)
    said = dict(coverage(model, ff.functionalize(model)))
    assert said["parameters"].startswith(f"{total - left:,} of {total:,} in F")
    assert said["left out"].startswith("1 frozen tensors, transformer.wte.weight")


def test_the_command_prints_one_screen_and_one_line_of_error(folder):
    arguments = ["check", str(folder / "gpt2"), "--text", str(folder / "plain.txt"), "--context", "10"]
    result = CliRunner().invoke(cli, arguments, prog_name="fisherfunc")
    assert result.exit_code == 0 and 6 <= len(result.stdout.splitlines()) <= 24
    missing = CliRunner().invoke(cli, ["check", str(folder / "absent")], prog_name="fisherfunc")
    assert missing.exit_code == 1 and missing.stdout == "" and len(missing.stderr.splitlines()) == 1


def test_the_command_prints_json_and_in_a_terminal_lines_that_fit(folder, monkeypatch):
    arguments = ["check", str(folder / "gpt2"), "--text", str(folder / "plain.txt"), "--context", "10"]
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], prog_name="fisherfunc").stdout)
    assert told == found(folder, "plain.txt") | {"model": told["model"]}
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    lines = CliRunner().invoke(cli, arguments, prog_name="fisherfunc").stdout.splitlines()
    assert max(map(len, lines)) <= 40 and any(line.startswith(" " * 12) for line in lines)


def test_what_the_structure_allows_is_said_with_the_reason_where_it_does_not(folder):
    said = found(folder, "plain.txt")
    assert said["causal"].startswith("yes") and said["separable"].startswith("yes")
    assert said["output"].startswith("transformer.wte.weight: passes begin below it")  # tied to lm_head.weight
    hf_folders.write("bert", folder / "bert")
    given = {"num_tokens": None, "context": 10, "dtype": "float32"}
    other = dict(findings(model=str(folder / "bert"), text=str(folder / "plain.txt"), **given))
    assert other["causal"].startswith("no: a position sees what comes after it") and "separable" in other


def test_a_plan_of_the_other_route_and_refusals_are_told():
    model = torch.nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    assert list(exploits(ff.plan(model, batch, route="dense", calibrate=False))) == []
    plan = ff.plan(model, batch, calibrate=False)
    structure = replace(plan.of_route.structure, stacked=False, refused={"stacks": "they differ"}, head=None)
    told = dict(exploits(replace(plan, of_route=replace(plan.of_route, structure=structure))))
    assert told["separable"] == "no: they run one at a time (they differ)" and told["output"].startswith("none: ")


def test_nothing_of_the_global_random_state_is_moved(folder):
    before = torch.random.get_rng_state()
    found(folder, "plain.txt")
    assert torch.equal(before, torch.random.get_rng_state())
