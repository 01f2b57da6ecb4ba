"""The folder of a checkpoint: whose it is, and what happens where something in it is damaged."""

from dataclasses import replace

import pytest
import torch
from plain_modules import mlp
from test_factored import grams
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.checkpoint import INDEX, Folder
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored.pieces import Piece
from fisherfunc.gradients.factored.store import ALIGNMENT, packed, unpacked
from fisherfunc.linalg.factors import PointFactors, SharedFactors
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
    """A folder with the pieces of two of three stacks, and the Grams that a pass has in the end."""
    monkeypatch.setattr(divide, "stack_width", lambda *_: 2)
    model, batch = problem()
    expected = grams(model, batch, "classification")
    with pytest.raises(KeyboardInterrupt):
        grams(model, batch, "classification", checkpoint=tmp_path / "kept", progress=stop_after(6))
    assert len(list((tmp_path / "kept").glob("pieces-*"))) == 2
    return tmp_path / "kept", expected


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
@pytest.mark.parametrize("part", ["pieces-0-0", "pieces-0-1"])
def test_damaged_pieces_are_computed_again(interrupted, damage, part):
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


def test_pieces_come_back_with_layout_sharing_and_order():
    base = torch.randn(200)
    shared = base[3:39].view(12, 3).mT  # strided, and not aligned
    wide = torch.randn(3, 50)[:, 4:9]
    ids = torch.tensor([4, 2, -1]).expand(2, 3)
    rows = torch.tensor([5, 7])
    pieces = [
        Piece(name="w", use=1, rows=rows, part=SharedFactors(own=torch.randn(2, 3, 4), shared=shared, axis=1)),
        Piece(name="w", use=1, rows=rows, part=SharedFactors(own=torch.randn(2, 2, 4), shared=shared, axis=1)),
        Piece(
            name="v", use=0, rows=rows, part=SharedFactors(own=torch.randn(2, 3, 4), shared=wide, axis=0), sequence=1
        ),
        Piece(name="e", use=2, rows=rows, part=SharedFactors(own=torch.randn(2, 3, 4), shared=ids[1], axis=1)),
        Piece(
            name="p", use=-1, rows=rows, part=PointFactors(own=base[:4].view(2, 2), shared=base[:2].view(2, 1), axis=1)
        ),
        Piece(name="b", use=0, rows=rows, part=torch.randn(2, 9).bfloat16()),
        Piece(name="none", use=0, rows=rows[:0], part=torch.zeros(0, 9)),
    ]
    boundary = {"boundary": torch.randn(2, 5), "scalar": torch.tensor(2.0), "broadcast": torch.ones(1).expand(4)}
    found, named = unpacked(*packed(pieces, boundary), device=torch.device("cpu"))
    assert all(torch.equal(named[name], value) for name, value in boundary.items())
    for one, other in zip(pieces, found, strict=True):
        assert (one.name, one.use, one.sequence) == (other.name, other.use, other.sequence)
        assert type(one.part) is type(other.part)
        for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
            assert torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert not a.numel() or a.data_ptr() % ALIGNMENT == b.data_ptr() % ALIGNMENT
    assert found[0].part.shared is found[1].part.shared
    assert found[0].part.shared is not found[2].part.shared


def tensors_of(piece):
    part = piece.part
    parts = (
        [part] if isinstance(part, torch.Tensor) else [x for x in vars(part).values() if isinstance(x, torch.Tensor)]
    )
    return [piece.rows, *parts]


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


def stopped_in_the_second_of_three_stacks(folder, monkeypatch, **options):
    monkeypatch.setattr(divide, "stack_width", lambda *_: 2)
    with pytest.raises(KeyboardInterrupt):
        grams(*problem(), "classification", checkpoint=folder, progress=stop_after(6), **options)
    assert len(list(folder.glob("pieces-*"))) == 2


def test_a_pass_goes_on_under_another_memory_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(divide, "stack_width", lambda *_: 2)
    expected = grams(*problem(), "classification")
    stopped_in_the_second_of_three_stacks(tmp_path, monkeypatch, memory_limit=10**9)
    done = []
    found = grams(
        *problem(), "classification", checkpoint=tmp_path, memory_limit=10**8, progress=lambda n, _: done.append(n)
    )
    assert done[0] == 4  # of two stacks, from what was kept
    assert all(torch.equal(found.grams[name], gram) for name, gram in expected.grams.items())
    assert found.metadata["resumed"] == (
        "under a memory limit of 100000000 bytes, 1000000000 before: what was kept was gone on from"
    )
    assert "resumed" not in grams(*problem(), "classification", checkpoint=tmp_path, memory_limit=10**8).metadata


def test_what_another_memory_limit_has_another_plan_for_is_computed_again(tmp_path, monkeypatch):
    expected = grams(*problem(), "classification")
    stopped_in_the_second_of_three_stacks(tmp_path, monkeypatch, memory_limit=10**9)
    monkeypatch.setattr(divide, "stack_width", lambda *_: 3)  # as less memory would have it
    for part in tmp_path.glob("pieces-*"):
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
