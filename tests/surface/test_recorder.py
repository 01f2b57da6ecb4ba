"""The spectrum along training: what is recorded is the spectrum at that step, and training does not notice."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from watching import changes, snapshot
from zoo import build

import fisherfunc as ff
from fisherfunc.surface import recorder as module

PLACES = {"before": False, "after forward": True, "after backward": False, "after step": True}
"""Where in a step it is recorded, and whether under autocast."""


class Dropping(nn.Module):
    """Dropout, batch statistics, and draws from every global generator, in any mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.layers(x) + 0.0 * (random.random() + np.random.rand() + torch.rand(()))


def dropping():
    torch.manual_seed(1)
    return Dropping(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def trained(record=None, *, place="before", accumulate=2, mixed=False):
    """The weights, their last gradients and the optimiser's after six updates of two batches each, and the states of
    the generators. The loop draws from all of these."""
    model, _ = dropping()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    random.seed(2), np.random.seed(3), torch.manual_seed(4)

    def at(here, step):
        if record is not None and here == place:
            before, states = snapshot(model), generators()
            record(model, step)
            assert changes(before, snapshot(model)) == [] and generators() == states

    for step in range(6):
        at("before", step)
        for _ in range(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = functional.cross_entropy(model(torch.randn(7, 4)) * random.random(), torch.randint(3, (7,)))
                at("after forward", step)
            loss.backward()
            at("after backward", step)
        optimiser.step()
        at("after step", step)
        if step < 5:
            optimiser.zero_grad()
    moments = [m for state in optimiser.state.values() for m in state.values()]
    values = [*model.state_dict().values(), *(p.grad for p in model.parameters()), *moments]
    return values, generators()


@pytest.mark.parametrize(("place", "mixed"), PLACES.items())
def test_training_is_bitwise_the_same_wherever_in_a_step_it_is_recorded(place, mixed):
    record = ff.SpectrumRecorder(dropping()[1], every=3)
    with_it, without = trained(record, place=place, mixed=mixed), trained(mixed=mixed)
    assert len(with_it[0]) == len(without[0]) and all(map(torch.equal, with_it[0], without[0]))
    assert with_it[1] == without[1]
    assert list(record.results) == [0, 3]


def test_what_is_recorded_is_the_spectrum_at_that_step():
    model, probe = dropping()
    record = ff.SpectrumRecorder(probe, every=3, blocks=ff.by_parameter, center=True)
    for step in range(5):
        given = record(model.train(), step)
        want = ff.fisher_spectrum(copy.deepcopy(model), probe, blocks=ff.by_parameter, center=True)
        assert (given is None) == (step % 3 > 0) and record.results.get(step) is given
        if given is not None:
            assert torch.equal(given.full.eigenvalues, want.full.eigenvalues)
            assert list(given.blocks) == list(want.blocks) and given.metadata["step"] == step
            assert given.metadata["tokens"] == want.metadata["tokens"]
        with torch.no_grad():
            model.layers[0].weight.mul_(1.5)
    assert not torch.equal(record.results[0].full.eigenvalues, record.results[3].full.eigenvalues)


def rows(batch):
    return [{key: value[index % 3] for key, value in batch.items()} for index in range(12)]


def trainer(tmp_path, callbacks, **options):
    from transformers import Trainer, TrainingArguments

    model, batch = build("gpt2")
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    start = [p.clone() for p in model.parameters()]
    return Trainer(model.train(), settings, train_dataset=rows(batch), callbacks=callbacks), start


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=str)
def test_a_trainer_gets_bitwise_the_same_weights_with_the_callback(tmp_path, options):
    _, batch = build("gpt2")
    record = ff.SpectrumRecorder(batch, every=4, num_tokens=3)
    runs = []
    for callbacks in ([ff.trainer_callback(record)], []):  # a trainer seeds where it is made
        without, start = trainer(tmp_path, callbacks, **options)
        without.train()
        runs.append([*without.model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *runs))
    assert not all(map(torch.equal, start, without.model.parameters()))
    assert without.model.config.attn_pdrop > 0  # there is chance in it
    assert list(record.results) == [0, 4]
    plain, _ = build("gpt2")
    plain.load_state_dict(without.model.state_dict())
    last = ff.fisher_spectrum(plain, batch, num_tokens=3)
    assert torch.equal(record.results[4].full.eigenvalues, last.full.eigenvalues)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def accelerated(model):
    from accelerate import Accelerator

    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model.eval())
    assert prepared(torch.randn(3, 4)).dtype == torch.float32 and "_original_forward" in vars(prepared)
    return prepared


WRAPPED = {
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled and distributed": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
    "distributed and compiled": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m), backend="eager"),
    "accelerated in mixed precision": accelerated,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_seen_through(process_group, kind):
    model, probe = dropping()
    plain = ff.SpectrumRecorder(probe)(copy.deepcopy(model), 0)
    wrapped = WRAPPED[kind](model)
    before = snapshot(model)
    got = ff.SpectrumRecorder(probe)(wrapped, 0)
    assert changes(before, snapshot(model)) == []
    assert got.metadata["model"] == plain.metadata["model"] == "Dropping"
    assert list(got.blocks) == list(plain.blocks)
    assert torch.equal(got.full.eigenvalues, plain.full.eigenvalues)


def test_the_gradients_of_a_distributed_step_are_not_disturbed(process_group):
    found = []
    for record in (None, ff.SpectrumRecorder(dropping()[1])):
        model = nn.parallel.DistributedDataParallel(dropping()[0])
        loss = functional.cross_entropy(model(torch.ones(3, 4)), torch.tensor([0, 1, 2]))
        if record is not None:
            record(model, 0)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_parameters_split_between_processes_are_an_error(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, probe = dropping()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"step 7 failed: .*'layers\.0\.weight' is split .*DTensor.*gather"):
        ff.SpectrumRecorder(probe)(model, 7)
    split = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(RuntimeError, match="step 0 failed: FullyShardedDataParallel may split"):
        ff.SpectrumRecorder(probe)(split, 0)


def test_under_autocast_gradients_are_those_of_the_weights_dtype():
    model, probe = dropping()
    record = ff.SpectrumRecorder(probe)
    plain = record(model, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, direct = record(model, 0), ff.fisher_spectrum(model, probe)
        assert model(probe[0]).dtype == torch.bfloat16  # so there is something to keep out
    assert torch.equal(plain.full.eigenvalues, inside.full.eigenvalues)
    assert torch.equal(plain.full.eigenvalues, direct.full.eigenvalues)


def test_results_are_on_disk_as_soon_as_they_are_there(tmp_path):
    model, probe = dropping()
    record = ff.SpectrumRecorder(probe, every=5, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    record(model, 0)
    record(model, 5)
    with torch.no_grad():
        model.layers[4].bias.fill_(torch.nan)
    states = generators()
    with pytest.raises(RuntimeError, match=r"step 10 failed: the loss is nan at sequence 0, position 0"):
        record(model, 10)
    assert generators() == states
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000000", "step-00000005"]
    again = ff.SpectrumRecorder.load(tmp_path / "run")
    assert list(again) == list(record.results) == [0, 5]
    for step, result in again.items():
        assert torch.equal(result.full.eigenvalues, record.results[step].full.eigenvalues)
        assert result.to_dict() == record.results[step].to_dict()


def test_an_error_may_be_passed_over_where_that_is_asked_for():
    model, probe = dropping()
    seen = []
    record = ff.SpectrumRecorder(probe, on_error=lambda step, error: seen.append((step, str(error))))
    with torch.no_grad():
        model.layers[4].bias.fill_(torch.nan)
    assert record(model, 3) is None and record.results == {}
    assert [step for step, _ in seen] == [3] and "loss is nan" in seen[0][1]


def test_an_error_that_is_no_failure_of_a_spectrum_is_not_passed_over(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "fisher_spectrum", broken)
    record = ff.SpectrumRecorder(dropping()[1], on_error=lambda *_: pytest.fail("a defect was passed over"))
    with pytest.raises(ZeroDivisionError):
        record(dropping()[0], 0)


BAD = {
    "every": ({"every": 0}, ValueError, "every=0"),
    "an unknown option": ({"evry": 3}, TypeError, "evry"),
    "checkpoint": ({"checkpoint": "folder"}, ValueError, "each step is another; leave it out"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_found_before_training(what):
    options, error, message = BAD[what]
    with pytest.raises(error, match=message):
        ff.SpectrumRecorder(dropping()[1], **options)


@pytest.mark.parametrize("step", [-1, -20])
def test_a_step_is_a_count(step):
    with pytest.raises(ValueError, match=f"got {step}"):
        ff.SpectrumRecorder(dropping()[1])(dropping()[0], step)


def test_a_folder_that_cannot_be_written_or_read_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"cannot write into .*file"):
        ff.SpectrumRecorder(dropping()[1], folder=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no step-…/spectrum\.json"):
        ff.SpectrumRecorder.load(tmp_path)


def test_without_parameters_there_is_nothing_to_record():
    with pytest.raises(RuntimeError, match="step 0 failed: ReLU has no parameter"):
        ff.SpectrumRecorder(dropping()[1])(nn.ReLU(), 0)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[train\]"'):
        ff.trainer_callback(ff.SpectrumRecorder(dropping()[1]))
