"""A pass that is stopped and goes on from its folder: to the same bits, without repeating what it had done."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from folders import PYTHONPATH
from odd_modules import squares
from passes import grams
from tight import tighten
from token_models import SometimesUnbatched
from zoo import build, two_batches

import fisherfunc as ff
from fisherfunc.gradients.capture.segments import WHOLE
from fisherfunc.gradients.checkpoint import INDEX
from fisherfunc.gradients.factored import descent, divide
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored import route as factored
from fisherfunc.gradients.factored.groups import everything


class Stop:
    """Progress that interrupts at its call number `after`; it remembers how far it came."""

    def __init__(self, after=None):
        self.after, self.calls = after, []

    def __call__(self, done, total):
        self.calls.append((done, total))
        if self.after is not None and len(self.calls) > self.after:
            raise KeyboardInterrupt


def assert_same(one, other):
    assert one.grams.keys() == other.grams.keys()
    assert [name for name, gram in one.grams.items() if not torch.equal(gram, other.grams[name])] == []


@pytest.fixture(params=["from the losses", "by segments"])
def several(monkeypatch, request):
    """Pieces of every kind (nothing is formed for being small), some groups, and stacks of at most two sequences."""
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setattr(divide, "stack_width", lambda *_: 2)
    tighten(monkeypatch, share=2.5)
    if request.param == "from the losses":
        monkeypatch.setattr(plans, "segments_of", lambda *_, **__: WHOLE)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "mlp", "cnn", "shared"])
def test_a_pass_stopped_anywhere_goes_on_to_the_same_bits(name, tmp_path):
    model, batch, kind = two_batches(name)
    whole = Stop()
    expected = grams(model, batch, kind, progress=whole, chunk_size=2)
    assert expected.metadata["passes"] >= 2
    for after in sorted({0, len(whole.calls) // 2, len(whole.calls) - 1}):
        folder = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            grams(model, batch, kind, progress=Stop(after), checkpoint=folder, chunk_size=2)
        again = Stop()
        assert_same(grams(model, batch, kind, progress=again, checkpoint=folder, chunk_size=2), expected)
        assert again.calls[-1] == whole.calls[-1]
        done = [count for count, _ in again.calls]
        assert done == sorted(set(done))


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_no_group_is_passed_over_twice_however_often_the_pass_is_stopped_between_two(name, tmp_path, monkeypatch):
    model, batch, kind = two_batches(name)
    expected = grams(model, batch, kind, chunk_size=2)
    groups = expected.metadata["passes"]
    assert groups >= 2
    ended = []  # the stacks whose pieces came to an end; those of the plan's trial come without progress
    original = descent.stack_pieces

    def watched(work, stack, taken, *, passed, **how):
        yield from original(work, stack, taken, passed=passed, **how)
        ended.append((stack.members, taken.group))

    monkeypatch.setattr(factored, "tried", lambda *_, **__: None)
    monkeypatch.setattr(descent, "stack_pieces", watched)
    stopped = 0
    while True:
        kept = len(list(tmp_path.glob("grams-*")))
        try:
            found = grams(model, batch, kind, chunk_size=2, checkpoint=tmp_path, progress=StopAfterGroup(tmp_path))
        except KeyboardInterrupt:
            stopped += 1
            assert len(list(tmp_path.glob("grams-*"))) == kept + 1
        else:
            break
    assert_same(found, expected)
    assert stopped == groups - 1
    stacks = len({members for members, _ in ended})
    # Of the group that was stopped, the first stack had ended or was on its way: no other is passed over again.
    assert groups * stacks <= len(ended) <= groups * stacks + stopped
    size = len(ended)
    assert_same(grams(model, batch, kind, chunk_size=2, checkpoint=tmp_path), expected)
    assert len(ended) == size


class StopAfterGroup:
    """Progress that interrupts at the first call after the Grams of another group were kept."""

    def __init__(self, folder):
        self.folder, self.before = folder, len(list(folder.glob("grams-*")))

    def __call__(self, done, total):
        if len(list(self.folder.glob("grams-*"))) > self.before:
            raise KeyboardInterrupt


def test_the_folder_of_a_finished_run_holds_plan_and_grams_alone(tmp_path):
    model, batch = build("gpt2")
    found = grams(model, batch, "causal_lm", checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grams-0.safetensors", INDEX]
    stop = Stop()
    assert_same(grams(model, batch, "causal_lm", checkpoint=tmp_path, progress=stop), found)
    assert stop.calls == [(found.num_units, found.num_units)]


def test_the_dense_route_goes_on_after_its_last_finished_slab(tmp_path):
    model, batch, kind = two_batches("gpt2")
    options = {"route": "dense", "chunk_size": 4, "memory_limit": 900_000}
    whole = Stop()
    expected = grams(model, batch, kind, progress=whole, **options)
    slabs = expected.metadata["passes"]
    assert 1 < slabs < 20
    a_slab = len(whole.calls) // slabs
    for after in sorted({0, a_slab // 2, a_slab, 2 * a_slab - 1, len(whole.calls) - 1}):  # within, and between two
        folder = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            grams(model, batch, kind, progress=Stop(after), checkpoint=folder, **options)
        again = Stop()
        assert_same(grams(model, batch, kind, progress=again, checkpoint=folder, **options), expected)
        assert len(again.calls) == a_slab * (slabs - after // a_slab)


def test_a_model_that_falls_back_to_the_dense_route_keeps_that_with_the_reason(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = SometimesUnbatched("plain").double()
    batches = [{"input_ids": torch.randint(9, (1, length))} for length in (6, 3)]
    expected = grams(model, batches, "causal_lm", chunk_size=2)
    assert expected.metadata["route"] == "dense"
    with pytest.raises(KeyboardInterrupt):  # in the dense pass, after the factored one has failed
        grams(model, batches, "causal_lm", checkpoint=tmp_path, chunk_size=2, progress=Stop(2))
    monkeypatch.setattr(factored, "planned", lambda *_: pytest.fail("planned again"))
    found = grams(model, batches, "causal_lm", checkpoint=tmp_path, chunk_size=2)
    assert_same(found, expected)
    for key in ("route", "route_reason", "passes"):
        assert found.metadata[key] == expected.metadata[key]


def test_tensors_that_go_slab_by_slab_have_a_folder_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(divide, "grouped", lambda held, order, *_: ((everything(order[1:]),), order[:1]))
    monkeypatch.setattr(plans, "segments_of", lambda *_, **__: WHOLE)
    model, batch, kind = two_batches("gpt2")
    whole = Stop()
    expected = grams(model, batch, kind, progress=whole)
    assert len(expected.metadata["slabbed_parameters"]) == 1
    with pytest.raises(KeyboardInterrupt):
        grams(model, batch, kind, checkpoint=tmp_path, progress=Stop(len(whole.calls) - 1))
    assert (tmp_path / "slabbed" / INDEX).exists()
    assert_same(grams(model, batch, kind, checkpoint=tmp_path), expected)
    stop = Stop()
    assert_same(grams(model, batch, kind, checkpoint=tmp_path, progress=stop), expected)
    assert len(stop.calls) == 1


SCRIPT = """
import os, signal, sys
sys.modules["torchvision"] = None
import pytest, torch
torch.set_num_threads(1)
from passes import grams
from tight import tighten
from zoo import two_batches
folder, stop, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def progress(done, total):
    if stop and done >= stop:
        os.kill(os.getpid(), signal.SIGKILL)

model, batch, kind = two_batches("gpt2")
tighten(pytest.MonkeyPatch(), share=2.5)
grams(model, batch, kind, checkpoint=folder, progress=progress).save(out)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_was_killed_goes_on_in_another(tmp_path, monkeypatch):
    out = tmp_path / "grams.safetensors"

    def start(stop):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path / "kept", str(stop), out],
            env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    model, batch, kind = two_batches("gpt2")
    tighten(monkeypatch, share=2.5)
    expected = grams(model, batch, kind)
    assert start(expected.num_units + 1).returncode == -signal.SIGKILL
    assert not out.exists() and list((tmp_path / "kept").glob("grams-0*"))
    ended = start(0)
    assert ended.returncode == 0, ended.stderr
    assert_same(ff.TokenGrams.load(out), expected)


def test_a_pass_that_is_repeated_without_unsound_tokens_keeps_each_of_its_passes(tmp_path):
    fn, batch, loss = squares()

    def run(**options):
        return ff.token_grams(fn, fn.params, batch, loss, drop_nonfinite=True, unit="sequence", **options)

    expected = run()
    assert_same(run(checkpoint=tmp_path), expected)
    assert len(list(tmp_path.rglob(INDEX))) == 3
    assert_same(run(checkpoint=tmp_path), expected)
