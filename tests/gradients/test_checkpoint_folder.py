"""The folder of a checkpoint: whose it is, and what happens where something in it is damaged."""

from dataclasses import replace

import pytest
import torch
from passes import grams
from plain_modules import mlp
from tight import tighten
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.checkpoint import INDEX, Folder, folder_of
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.records.plain import from_plain, to_plain
from fisherfunc.records.tensor_files import DamagedError, read_tensors, write_tensors


def problem(seed=0):
    torch.manual_seed(seed)
    return mlp(), (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A folder with the Grams of two groups and what the next starts from, and the Grams of the whole pass."""
    stopped_in_the_third_group(tmp_path / "kept", monkeypatch)
    return tmp_path / "kept", grams(*problem(), "classification")


def other_parameters(model, batch):
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    return model, batch, {}


def other_batch(model, batch):
    return model, (batch[0] + 1e-6, batch[1]), {}


CHANGES = {
    "parameters": other_parameters,
    "batch": other_batch,
    "tokens": lambda model, batch: (model, batch, {"num_tokens": 5}),
    r"chunk_size \(None there, 3 here\)": lambda model, batch: (model, batch, {"chunk_size": 3}),
    r"gram_dtype \(float64 there, float32 here\)": lambda m, b: (m, b, {"gram_dtype": torch.float32}),
    r"route \(factored there, dense here\)": lambda model, batch: (model, batch, {"route": "dense"}),
    r"model \(Sequential there, Other here\)": lambda model, batch: (Other(*model), batch, {}),
}


class Other(nn.Sequential):
    pass


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_what_to_do(interrupted, what):
    folder, expected = interrupted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, batch, options = CHANGES[what](*problem())
    with pytest.raises(ValueError, match=rf"is of another run; these differ: .*{what}.*another folder, or delete"):
        grams(model, batch, "classification", checkpoint=folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(grams(*problem(), "classification", checkpoint=folder).block(), expected.block())


def test_frozen_parameters_buffers_and_versions_count_too(tmp_path, monkeypatch):
    model, batch = problem()
    fn = ff.functionalize(model, parameters=["0.*"])
    loss = ff.losses.classification()
    ff.token_grams(fn, fn.params, batch, loss, checkpoint=tmp_path)
    other = replace(fn, frozen={name: value + 1 for name, value in fn.frozen.items()})
    with pytest.raises(ValueError, match="these differ: other tensors of the model;"):
        ff.token_grams(other, fn.params, batch, loss, checkpoint=tmp_path)
    monkeypatch.setattr("fisherfunc.gradients.fingerprint.versions", lambda: {"torch": "9.9"})
    with pytest.raises(ValueError, match=r"these differ: versions \(.*'torch': '9.9'"):
        ff.token_grams(fn, fn.params, batch, loss, checkpoint=tmp_path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = [cut_short, one_bit, lambda path: path.write_bytes(b""), lambda path: path.unlink()]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["grams-0", "grams-1", "cotangents-1-0", "cotangents-2-0"])
def test_damaged_files_are_computed_again(interrupted, damage, part):
    folder, expected = interrupted
    damage(folder / f"{part}.safetensors")
    found = grams(*problem(), "classification", checkpoint=folder)
    assert all(torch.equal(found.grams[name], gram) for name, gram in expected.grams.items())


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_grams_are_computed_again(tmp_path, damage):
    expected = grams(*problem(), "classification", checkpoint=tmp_path)
    damage(tmp_path / "grams-0.safetensors")
    for _ in range(2):
        found = grams(*problem(), "classification", checkpoint=tmp_path)
        assert all(torch.equal(found.grams[name], gram) for name, gram in expected.grams.items())


@pytest.mark.parametrize("damage", DAMAGES[:3])
def test_a_damaged_plan_is_an_error_that_says_so(interrupted, damage):
    folder, _ = interrupted
    damage(folder / INDEX)
    with pytest.raises(ValueError, match=rf"{INDEX} is damaged .*another folder, or delete this one"):
        grams(*problem(), "classification", checkpoint=folder)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.safetensors").write_text("all of it")
    with pytest.raises(ValueError, match=r"holds other files and no plan\.safetensors; give an empty or a new folder"):
        grams(*problem(), "classification", checkpoint=tmp_path)
    assert (tmp_path / "thesis.safetensors").read_text() == "all of it"


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match="x' is a file; give a folder"):
        grams(*problem(), "classification", checkpoint=tmp_path / "x")


def test_another_plan_deletes_what_was_kept_under_the_first(tmp_path):
    folder = Folder(tmp_path, {"model": "A"})
    folder.begin(("plan", 1))
    folder.write("grams-0", {"a": torch.ones(2)}, {})
    folder.begin(("plan", 1))
    assert folder.has("grams-0")
    folder.begin(("plan", 2), "as the first was wrong")
    assert not folder.has("grams-0")
    again = Folder(tmp_path, {"model": "A"})
    assert (again.plan, again.note) == (("plan", 2), "as the first was wrong")


def test_a_file_of_tensors_that_share_memory_is_read_as_written(tmp_path):
    base = torch.arange(6.0)
    tensors = {"a": base, "b": base[2:], "c": base.view(2, 3).mT, "d": torch.tensor(1.5, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"n": [1, "ü"]})
    found, header = read_tensors(tmp_path / "x.safetensors")
    assert header == {"n": [1, "ü"]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    one_bit(tmp_path / "x.safetensors")
    with pytest.raises(DamagedError, match="checksum"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_value_that_json_cannot_give_back_is_refused():
    with pytest.raises(TypeError, match="got Tensor"):
        to_plain({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected a dataclass of fisherfunc, got os\.system"):
        from_plain({"record": ["os", "system", {}]})


def in_groups(monkeypatch):
    """Several groups of parameters, that start at several segments."""
    monkeypatch.setattr(divide, "stack_width", lambda *_: 2)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    tighten(monkeypatch, share=2.5)


def stopped_in_the_third_group(folder, monkeypatch, **options):
    in_groups(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        grams(*problem(), "classification", checkpoint=folder, progress=stop_after(14), **options)
    assert {"grams-0", "grams-1", "cotangents-1-0", "cotangents-2-0"} < {p.name.split(".")[0] for p in folder.iterdir()}


def test_a_pass_goes_on_under_another_memory_limit(tmp_path, monkeypatch):
    stopped_in_the_third_group(tmp_path, monkeypatch, memory_limit=10**9)
    expected = grams(*problem(), "classification")
    done = []
    found = grams(
        *problem(), "classification", checkpoint=tmp_path, memory_limit=10**8, progress=lambda n, _: done.append(n)
    )
    assert done[0] == 12  # of two groups, from what was kept
    assert all(torch.equal(found.grams[name], gram) for name, gram in expected.grams.items())
    assert found.metadata["resumed"] == (
        "under a memory limit of 100000000 bytes, 1000000000 before: what was kept was gone on from"
    )
    assert "resumed" not in grams(*problem(), "classification", checkpoint=tmp_path, memory_limit=10**8).metadata


def test_what_another_memory_limit_has_another_plan_for_is_computed_again(tmp_path, monkeypatch):
    expected = grams(*problem(), "classification")
    stopped_in_the_third_group(tmp_path, monkeypatch, memory_limit=10**9)
    monkeypatch.setattr(divide, "stack_width", lambda *_: 3)  # as less memory would have it
    for part in tmp_path.glob("grams-*"):
        write_tensors(part, {"of the other plan": torch.ones(1)}, {})
    found = grams(*problem(), "classification", checkpoint=tmp_path, memory_limit=10**8)
    torch.testing.assert_close(found.block(), expected.block())
    assert found.metadata["resumed"].endswith("what was kept was of another plan and was computed again")


def test_a_checkpoint_that_cannot_be_written_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fisherfunc.gradients.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match=r"checkpoint='.*' cannot be written \(No space left on device\); .*another disk"):
        grams(*problem(), "classification", checkpoint=tmp_path)


def test_what_another_number_of_ranks_has_kept_is_refused_by_both_numbers(tmp_path):
    model, batch = problem()
    own = folder_of(tmp_path, rank=1, size=2)
    own.mkdir()
    assert folder_of(tmp_path, rank=0, size=3).parent == tmp_path  # nothing is kept there yet
    (own / INDEX).touch()
    assert folder_of(tmp_path, rank=1, size=2) == own
    with pytest.raises(ValueError, match=r"is of a run by 2 ranks, and this one is by 3 ranks: .*start as many"):
        folder_of(tmp_path, rank=0, size=3)
    with pytest.raises(ValueError, match="is of a run by 2 ranks, and this one is by one process"):
        grams(model, batch, "classification", checkpoint=tmp_path)
    grams(model, batch, "classification", checkpoint=tmp_path / "alone")
    with pytest.raises(ValueError, match="is of a run by one process, and this one is by 2 ranks"):
        folder_of(tmp_path / "alone", rank=0, size=2)
