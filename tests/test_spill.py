"""Factors in files: the same bits, nothing left behind, fewer passes in little memory."""

import errno
import os

import pytest
import torch
from test_factored import grams
from zoo import CASES, build, token_ids

import fisherfunc as ff
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.records import spill as spilled
from fisherfunc.records.spill import spilling


@pytest.mark.parametrize("name", ["gpt2", "bert", "cnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_in_files_give_the_same_bits_and_leave_no_file(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = build(name, dtype=dtype)
    made = []
    mapped = spilled._mapped
    monkeypatch.setattr(spilled, "_mapped", lambda *a: (made.append(os.listdir(tmp_path)), mapped(*a))[1])
    plain = grams(model, batch, CASES[name].kind)
    found = grams(model, batch, CASES[name].kind, spill=tmp_path)
    assert len(made) > 3 and not any(made) and os.listdir(tmp_path) == []
    assert all(torch.equal(found.grams[n], gram) for n, gram in plain.grams.items())


def test_a_small_memory_takes_one_pass_where_factors_lie_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, _ = build("gpt2")
    batch = {"input_ids": token_ids(12, 15)}
    peak = grams(model, batch, "causal_lm", chunk_size=1).metadata["predicted_peak_bytes"]
    for step in range(1, 60):
        options = {"chunk_size": 1, "memory_limit": int(peak * 0.85**step)}
        plain = grams(model, batch, "causal_lm", **options)
        if plain.metadata["passes"] > 1:
            break
    found = grams(model, batch, "causal_lm", spill=tmp_path, **options)
    assert plain.metadata["passes"] > 1 == found.metadata["passes"]
    scale = float(plain.block().diagonal().max())
    assert float((found.block() - plain.block()).abs().max()) <= 1e-5 * scale


def test_a_pass_in_files_that_is_stopped_goes_on(tmp_path):
    model, batch = build("gpt2")

    def stop(done, total):
        raise KeyboardInterrupt

    options = {"spill": tmp_path / "spill", "checkpoint": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        grams(model, batch, "causal_lm", progress=stop, **options)
    assert os.listdir(tmp_path / "spill") == []
    assert torch.equal(grams(model, batch, "causal_lm", **options).block(), grams(model, batch, "causal_lm").block())


def test_a_full_disk_is_an_error_that_names_folder_need_and_room(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"spill='{tmp_path}' has no room for 2400 bytes, \d+ are free \(No space left"):
        spilling(tmp_path)((20, 30), torch.empty(0))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_truly_too_small_is_found_before_a_write(tmp_path):
    with pytest.raises(OSError, match="has no room for"):
        spilling(tmp_path)((2**50,), torch.empty(0))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_pass(tmp_path):
    (tmp_path / "file").write_text("")
    model, batch = build("mlp")
    with pytest.raises(OSError, match=r"spill='.*file' cannot be written .*another folder"):
        ff.fisher_spectrum(model, batch, spill=tmp_path / "file", progress=lambda *_: pytest.fail("a pass ran"))


def test_a_spilled_tensor_is_a_tensor(tmp_path):
    empty = spilling(tmp_path / "new")
    tensor = empty((3, 4), torch.empty(0, dtype=torch.float64))
    other = empty((3, 4), torch.empty(0, dtype=torch.float64))
    tensor.fill_(2), other.fill_(3)
    assert tensor.shape == (3, 4) and float(tensor.sum()) == 24
    assert empty((0, 4), tensor).shape == (0, 4)
