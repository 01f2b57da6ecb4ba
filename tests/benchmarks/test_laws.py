"""The law suite holds for a few hundred seeds, and sees what is broken on purpose."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import REPOSITORY

import fisherfunc as ff
from benchmarks.laws import picture as picturing
from benchmarks.laws.__main__ import main
from benchmarks.laws.judge import Row, built, is_ours, judged
from benchmarks.laws.parts import MEETING
from benchmarks.laws.picture import changes, picture
from benchmarks.laws.recipe import Recipe, drawn
from fisherfunc.gradients import grams, losses
from fisherfunc.gradients.losses import classification
from fisherfunc.models.calls import isolation, writes

SEEDS, SHARDS = 200, 4
LEAST_RIGHT = 0.8
"""Of cases whose samples do not meet, so that refusing everything does not pass. By design some 4 % have a part that no
gradient can follow, 5 % a memory limit that is too small, a mask or an axis that can be read in two ways."""


@pytest.fixture(autouse=True)
def typed(monkeypatch):
    """The checks of types in these tests draw which entry of a list they look at by Python's generator."""
    monkeypatch.setattr(picturing, "random", SimpleNamespace(getstate=lambda: None))


def plain(*parts: str, **others) -> Recipe:
    """A classification of two samples by these parts."""
    chosen = {"task": "classification", "form": "tuple", "counts": (3,), "lengths": (1,), "extra": "none"}
    chosen |= {"options": {"route": "factored"}, "target_dtype": "int64", "embedding": "plain", "used": False}
    return replace(drawn(1), parts=parts, output="tensor", training=False, **{**chosen, **others})


@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
def test_every_case_is_right_or_refused_and_nothing_is_changed(shard, tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = ["-m", "benchmarks.laws", f"--cases={SEEDS}", f"--shard={shard}/{SHARDS}", f"--rows={rows}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr + done.stdout
    found = [Row(**json.loads(line)) for line in rows.read_text().splitlines()]
    assert [row.seed for row in found] == list(range(shard - 1, SEEDS, SHARDS))
    apart = [row for row in found if row.meets is False]
    assert sum(row.verdict == "right" for row in apart) >= LEAST_RIGHT * len(apart) > 0, done.stdout


REFUSED = {
    "listed": "reaches a parameter of shape",
    "adds a part": "reaches a parameter of shape",
    "writes as a vector": "other memory",
    "writes frozen as a vector": "other memory",
    "batch norm without statistics": "Expected more than 1 value per channel",
}
"""What no gradient can follow, what takes the user's memory away, and what does not take one sample."""
IN_BATCHES = [part for part in (*MEETING, "writes where asked", "writes frozen where asked") if part not in REFUSED]
"""What samples meet in; a write that the sum of a batch decides about is of that kind."""


@pytest.mark.parametrize("part", [*IN_BATCHES, *REFUSED])
def test_what_has_to_be_refused_is_refused_for_that(part):
    row = judged(plain(part))
    assert row.verdict == "refused", row
    assert (row.meets is True) == (part in IN_BATCHES), row
    assert REFUSED.get(part, "depend on each other") in row.reason, row


def verdict(recipe: Recipe, *, self_check: bool = False) -> tuple[str, str]:
    row = judged(replace(recipe, options={**recipe.options, "self_check": self_check}))
    return row.verdict, row.reason


def test_state_that_calls_share_is_seen(monkeypatch):
    recipe = plain("cached in a dictionary", counts=(1,))
    assert verdict(recipe) == ("right", "")
    monkeypatch.setattr(isolation, "_is_fixed", lambda value: True)
    monkeypatch.setattr(isolation, "_is_empty", lambda value: False)
    assert verdict(recipe)[0] == "refused" and "past the module's attributes" in verdict(recipe)[1]
    listing = plain("appends to a list", counts=(1,))
    assert verdict(listing)[0] != "right"


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_one_row_of_one_gram_that_is_off_by_a_millionth_is_seen(monkeypatch, route):
    recipe, passed = plain("attention", options={"route": route}), grams.passed_by_route

    def off(*arguments):
        found, how = passed(*arguments)
        found["parts.0.mix.weight"][0] *= 1 + 1e-6
        return found, how

    monkeypatch.setattr(grams, "passed_by_route", off)
    assert verdict(recipe)[0] == "wrong" and "parts.0.mix.weight" in verdict(recipe)[1]
    assert verdict(recipe, self_check=True)[0] == "refused"


def test_a_row_that_is_missing_is_seen(monkeypatch):
    token_grams = ff.token_grams
    monkeypatch.setattr(ff, "token_grams", lambda *a, **options: token_grams(*a, **{**options, "num_tokens": 2}))
    assert verdict(plain("dense"))[0] == "wrong"


@pytest.mark.parametrize("part", ["writes in place", "writes frozen through data", "writes through numpy"])
def test_writes_to_the_users_weights_are_seen(monkeypatch, part):
    monkeypatch.setattr(writes.WritesRefused, "end", lambda self, tensors: None)
    found, reason = verdict(plain(part, counts=(1,)))
    assert found == "changed" and "_parameters['weight']" in reason


def test_samples_that_meet_unseen_are_seen(monkeypatch):
    assert verdict(plain("meets in gradients")) == ("wrong", verdict(plain("meets in gradients"))[1])
    monkeypatch.setattr(losses, "classification", lambda: losses.each_alone(classification()))
    assert verdict(plain("mean of the batch"))[0] == "wrong"


def test_a_batch_of_a_loader_that_was_never_pulled_is_not_asked_whether_its_samples_meet():
    row = judged(drawn(1104145))  # one token, of the first batch; those of the second meet
    assert (row.verdict, row.meets) == ("right", False), row


def test_errors_that_are_not_ours_are_seen(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("of torch")

    monkeypatch.setattr(ff, "token_grams", fails)
    assert verdict(plain("dense")) == ("failed", "RuntimeError: of torch")
    with pytest.raises(ValueError) as found:
        torch.func.vmap(torch.sin)(1.0)
    assert not is_ours(found.value)


def written(model, batch):
    with torch.no_grad():
        model.head.weight[0, 0] += 1


CHANGES = {
    "a weight": written,
    "a weight's memory": lambda model, batch: setattr(model.head.weight, "data", model.head.weight.data.clone()),
    "a gradient": lambda model, batch: setattr(model.head.weight, "grad", torch.ones_like(model.head.weight)),
    "a flag": lambda model, batch: model.parts[0].train(),
    "a counter": lambda model, batch: setattr(model.parts[0], "calls", 1),
    "an object": lambda model, batch: model.parts[1].config.history.append(1),
    "a buffer": lambda model, batch: model.parts[2].steps.add_(1),
    "a slot": lambda model, batch: model.parts[3].kept.held.update(a=1),
    "a hook": lambda model, batch: model.head.register_forward_hook(lambda *a: None),
    "the batch": lambda model, batch: batch["x"].add_(1),
    "a list in the batch": lambda model, batch: batch["extra"].append(1),
    "a key of the batch": lambda model, batch: batch.pop("labels"),
    "torch's generator": lambda model, batch: torch.rand(()),
    "NumPy's generator": lambda model, batch: np.random.rand(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_picture_shows_every_kind_of_change(change):
    parts = ("counts", "configured", "writes a buffer", "cached in slots")
    case = built(plain(*parts, form="dict", extra="lengths list"))
    before = picture(case.model, case.batch)
    assert changes(before, picture(case.model, case.batch)) == []
    change(case.model, case.batch)
    assert changes(before, picture(case.model, case.batch)) != []


def test_the_command_goes_on_where_it_ended_and_says_what_is_bad(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    for shard in ("1/2", "2/2"):
        assert main(["--cases", "6", "--first", "10", "--shard", shard, "--rows", str(rows)]) == 0
    held = [Row(**json.loads(line)) for line in rows.read_text().splitlines()]
    assert sorted(row.seed for row in held) == list(range(10, 16))
    rows.write_text(rows.read_text().replace('"verdict": "right"', '"verdict": "wrong"', 1))
    capsys.readouterr()
    assert main(["--cases", "6", "--first", "10", "--rows", str(rows)]) == 1
    assert capsys.readouterr().out.startswith("6 cases: ")


def test_a_case_is_explained_by_the_parts_that_are_enough(capsys):
    assert main(["--case", "0"]) == 0
    told = capsys.readouterr().out
    assert "parts: " in told and "options: " in told and told.splitlines()[-1].startswith("right")
