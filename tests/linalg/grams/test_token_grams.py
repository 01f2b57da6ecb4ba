"""`TokenGrams`: blocks, selection, sequences and centring are those of the rows; files give back every bit."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from builders import grams_of, matrices, total_square
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from fisherfunc.linalg.grams import token_grams as module
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.grams.tokens import TOKEN_FIELDS
from fisherfunc.records.provenance import Provenance
from fisherfunc.testing import gradient_trees

TREE = {
    name: torch.randn(4, *shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    for index, (name, shape) in enumerate({"b.0.weight": (2, 3), "a.1.bias": (2,), "scalar": ()}.items())
}
SEQUENCE = torch.tensor([5, 2, 5, 2])


def assert_grams(got, tree, *, like):
    assert list(got.grams) == list(tree)
    for name, g in matrices(tree).items():
        assert_close(got.grams[name], g @ g.mT, atol=1e-13 * total_square({name: like[name]}), rtol=0)


@given(gradient_trees(), st.data())
def test_a_block_is_the_gram_of_its_rows_side_by_side(tree, data):
    names = data.draw(st.lists(st.sampled_from(list(tree)), min_size=1, unique=True))
    rows = torch.cat([matrices(tree)[name] for name in names], dim=1)
    tolerance = 1e-13 * total_square(tree)
    assert_close(grams_of(tree).block(names), rows @ rows.mT, atol=tolerance, rtol=0)
    assert_close(grams_of(tree).block(), grams_of(tree).block(reversed(list(tree))), atol=tolerance, rtol=0)


def test_a_block_does_not_alias_its_first_gram():
    grams = grams_of(TREE)
    first = grams.grams["b.0.weight"].clone()
    grams.block().zero_()
    assert torch.equal(grams.block(["b.0.weight"]), first) and torch.equal(grams.grams["b.0.weight"], first)


def test_a_block_of_unknown_or_no_names_is_an_error():
    with pytest.raises(KeyError, match=r"no Gram for \['none'\]"):
        grams_of(TREE).block(["scalar", "none"])
    with pytest.raises(ValueError, match="at least one parameter name"):
        grams_of(TREE).block([])


@given(gradient_trees())
def test_centring_is_that_of_the_rows_and_remembers_the_scale(tree):
    centered = grams_of(tree).center()
    assert_grams(centered, {name: g - g.mean(dim=0) for name, g in tree.items()}, like=tree)
    assert centered.centered and not grams_of(tree).centered
    for name, gram in grams_of(tree).grams.items():
        assert_close(centered.scale[name], torch.linalg.matrix_norm(gram), atol=0, rtol=1e-12)


@given(gradient_trees(), st.data())
def test_selecting_is_that_of_the_rows_and_of_their_tokens(tree, data):
    num_rows = len(next(iter(tree.values())))
    index = data.draw(st.lists(st.integers(-num_rows, num_rows - 1), min_size=1, max_size=7))
    chosen, grams = grams_of(tree).select(index), grams_of(tree)
    assert_grams(chosen, {name: g[index] for name, g in tree.items()}, like=tree)
    assert chosen.num_units == len(index)
    for field in TOKEN_FIELDS:
        assert torch.equal(getattr(chosen.tokens, field), getattr(grams.tokens, field)[index])


def test_a_mask_selects_like_its_indices():
    mask = torch.tensor([True, False, False, True])
    by_mask, by_index = grams_of(TREE).select(mask), grams_of(TREE).select(torch.tensor([0, 3]))
    assert torch.equal(by_mask.block(), by_index.block()) and by_mask.num_units == 2
    assert torch.equal(grams_of(TREE).select(mask.tolist()).block(), by_index.block())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([], ValueError, "no row of 4"),
        (torch.zeros(4, dtype=torch.bool), ValueError, "no row of 4"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"shape \(4,\), got \(3,\)"),
        ([0, 4], IndexError, r"4 rows, got \[0, 4\]"),
        ([-5], IndexError, "4 rows"),
        (torch.tensor([[0, 1]]), IndexError, "flat index"),
        (torch.tensor(2), IndexError, "flat index"),
        (torch.tensor([0.0, 1.0]), IndexError, "flat index of integers"),
    ],
)
def test_a_bad_selection_is_an_error(index, error, message):
    with pytest.raises(error, match=message):
        grams_of(TREE).select(index)


def test_centred_rows_are_not_selected_and_not_summed():
    with pytest.raises(ValueError, match="select first, then center"):
        grams_of(TREE).center().select([0])
    with pytest.raises(ValueError, match="by_sequence before center"):
        grams_of(TREE).center().by_sequence()
    with pytest.raises(ValueError, match="unit='sequence'"):
        grams_of(TREE).by_sequence().by_sequence()


@given(gradient_trees(), st.data())
def test_by_sequence_is_the_gram_of_summed_rows(tree, data):
    num_rows = len(next(iter(tree.values())))
    sequence = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows)))
    tokens, present = grams_of(tree, sequence=sequence), sorted(set(sequence.tolist()))
    sums = {name: torch.stack([g[sequence == s].sum(dim=0) for s in present]) for name, g in tree.items()}
    summed = tokens.by_sequence()
    assert_grams(summed, sums, like={name: num_rows**0.5 * g for name, g in tree.items()})
    assert summed.unit == "sequence" and summed.tokens.sequence.tolist() == present
    losses = torch.stack([tokens.tokens.loss[sequence == s].sum() for s in present])
    assert_close(summed.tokens.loss, losses, atol=1e-6, rtol=0)
    assert bool((summed.tokens.position == -1).all())


@given(gradient_trees())
def test_the_scale_of_summed_rows_bounds_their_gram(tree):
    sequence = torch.zeros(len(next(iter(tree.values()))), dtype=torch.long)
    summed = grams_of(tree, sequence=sequence).by_sequence()
    for name, gram in summed.grams.items():
        assert float(torch.linalg.matrix_norm(gram)) <= float(summed.scale[name]) * (1 + 1e-12)
    assert_close(summed.summed().scale, sum(summed.scale.values()), atol=0, rtol=1e-12)
    assert grams_of(tree).summed().scale is None


@given(gradient_trees())
def test_token_grams_are_a_mapping_of_grams(tree):
    grams = grams_of(tree).center()
    assert isinstance(grams, Mapping) and len(grams) == len(tree)
    assert list(grams) == list(grams.keys()) == list(tree) == list(grams.grams)
    for (name, gram), rows in zip(grams.items(), matrices(tree).values(), strict=True):
        assert name in grams and gram.matrix is grams.grams[name] and gram.scale is grams.scale[name]
        assert (gram.num_units, gram.num_params, gram.precision) == (*rows.shape, grams.precision)
    with pytest.raises(KeyError, match=r"no Gram for \['none'\]; there are Grams for"):
        grams["none"]
    assert "none" not in grams and grams.get("none") is None
    assert grams == grams != grams_of(tree).center()  # by identity, as records are


@pytest.mark.parametrize("prepare", [lambda g: g, TokenGrams.center, TokenGrams.by_sequence])
def test_a_file_gives_back_every_bit_in_order(tmp_path, prepare):
    grams = prepare(grams_of(TREE, sequence=SEQUENCE))
    grams.save(tmp_path / "grams.safetensors")
    loaded = TokenGrams.load(tmp_path / "grams.safetensors")
    assert list(loaded.grams) == list(grams.grams) == list(TREE) == list(loaded.num_params)
    for ours, theirs in ((grams.grams, loaded.grams), (grams.scale, loaded.scale)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    for field in TOKEN_FIELDS:
        assert torch.equal(getattr(loaded.tokens, field), getattr(grams.tokens, field))
    for field in ("num_params", "unit", "centered", "precision", "metadata"):
        assert getattr(loaded, field) == getattr(grams, field), field
    assert list(tmp_path.iterdir()) == [tmp_path / "grams.safetensors"]


def test_the_order_saved_is_that_of_the_grams(tmp_path):
    grams = dataclasses.replace(grams_of(TREE), num_params=dict(reversed(grams_of(TREE).num_params.items())))
    grams.save(tmp_path / "g.safetensors")
    assert list(TokenGrams.load(tmp_path / "g.safetensors").grams) == list(TREE)


def test_grams_in_float32_that_share_memory_are_saved(tmp_path):
    shared = torch.eye(4)
    grams = dataclasses.replace(
        grams_of(TREE),
        grams={"a.b": shared, "a.c": shared, "d": shared.mT},
        num_params=dict.fromkeys(("a.b", "a.c", "d"), 4),
        precision=torch.bfloat16,
    )
    grams.save(tmp_path / "g.safetensors")
    loaded = TokenGrams.load(tmp_path / "g.safetensors")
    assert loaded.precision == torch.bfloat16
    assert all(torch.equal(gram, shared) and gram.dtype == torch.float32 for gram in loaded.grams.values())


def test_a_missing_file_is_told_from_a_damaged_and_from_a_foreign_one(tmp_path):
    path = tmp_path / "grams.safetensors"
    with pytest.raises(FileNotFoundError):
        TokenGrams.load(path)
    grams_of(TREE).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            TokenGrams.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"has format None, expected 'fisherfunc\.token_grams\.1'"):
        TokenGrams.load(path)


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, failure):
    path = tmp_path / "grams.safetensors"
    grams_of(TREE).save(path)
    before = path.read_bytes()

    def interrupted(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(type(failure)):
        grams_of(TREE).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_metadata_that_is_not_plain_is_an_error_and_leaves_no_file(tmp_path):
    grams = dataclasses.replace(grams_of(TREE), provenance=Provenance(more={"mine": object()}))
    with pytest.raises(TypeError):
        grams.save(tmp_path / "grams.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_sums_over_sequences_say_so():
    grams = dataclasses.replace(grams_of(TREE, sequence=SEQUENCE), provenance=Provenance(unit="token"))
    assert grams.by_sequence().metadata["unit"] == grams.by_sequence().unit == "sequence"


def test_a_fingerprint_says_which_tokens_the_rows_are_in_any_order():
    grams = dataclasses.replace(grams_of(TREE, sequence=SEQUENCE), provenance=Provenance(batch="a"))
    count = grams.num_units
    whole = grams.fingerprint
    assert len(whole) == 16 and grams.select(range(count)[::-1]).fingerprint == whole
    assert grams.center().fingerprint == whole
    halves = {grams.select(range(count - 1)).fingerprint, grams.select(range(1, count)).fingerprint}
    summed = {grams.by_sequence().fingerprint, grams.select(range(count - 1)).by_sequence().fingerprint}
    other = dataclasses.replace(grams, provenance=Provenance(batch="b")).fingerprint
    assert len({whole, other, *halves, *summed}) == 6
    assert dataclasses.replace(grams, provenance=Provenance()).fingerprint is None
    assert len({grams.select(index).fingerprint for index in ([0, 1], [0, 0, 1], [0, 1, 1])}) == 3


def test_a_token_that_has_a_row_for_each_of_several_targets_is_one_token():
    sequence, position = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1])
    twice = [column.repeat_interleave(2) for column in (sequence, position)]
    one = module.which_tokens(sequence, position, num_units=3)
    assert module.which_tokens(*twice, num_units=3) == one != module.which_tokens(*twice, num_units=6)
