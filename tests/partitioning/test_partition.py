"""The partition of real architectures: exact labels, and laws that hold for every family.

`families.toml` says what to expect. The models are tiny, randomly initialised and on the
meta device: only the names of their parameters matter.
"""

import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch

from fisherfunc.partitioning import OTHER, by_layer, by_module, partition

TABLE = tomllib.loads(Path(__file__).with_name("families.toml").read_text())
FAMILIES = TABLE["family"]
ROLES_INSIDE = ("attention", "mlp", "mixer", "normalization")
MODULE_LABELS = {*ROLES_INSIDE, "embedding", "output", OTHER}

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def names_of(family: str) -> tuple[str, ...]:
    transformers = pytest.importorskip("transformers")
    case = FAMILIES[family]
    model_class = getattr(transformers, case["model"])
    config_class = getattr(transformers, case.get("config", ""), model_class.config_class)
    settings = [TABLE["sizes"][size] for size in case.get("sizes", "").split()]
    merged = {key: value for some in (*settings, case.get("more", {})) for key, value in some.items()}
    with torch.device("meta"):
        model = model_class(config_class(**merged))
    return tuple(name for name, _ in model.named_parameters())


def under(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors of the module `path`, at any depth, or the tensor `path` itself."""
    return tuple(name for name in names if name == path or name.startswith(f"{path}."))


def owned_by(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if path in (name, name.rpartition(".")[0]))


def members(family: str) -> dict[str, str]:
    """The path of every member of every stack, by its label."""
    stacks = FAMILIES[family]["stacks"].items()
    described = [(path, *text.split()) for path, text in stacks]
    return {f"{label}.{i}": f"{path}.{i}" for path, label, num in described for i in range(int(num))}


@every_family
def test_a_layer_block_is_exactly_one_member_of_a_configured_stack(family):
    names, paths = names_of(family), members(family)
    blocks = partition(names, by_layer)
    expected = {label: under(path, names) for label, path in paths.items()}
    assert all(expected.values())
    assert {label: blocks.get(label) for label in expected} == expected
    assert blocks.keys() - expected.keys() == set(FAMILIES[family]["ends"].split())


@every_family
def test_every_parameter_has_a_role_but_for_the_documented_ones(family):
    blocks = partition(names_of(family), by_module)
    assert set(blocks.get(OTHER, ())) == set(FAMILIES[family].get("other", "").split())
    assert blocks.keys() <= MODULE_LABELS


@pytest.mark.parametrize(
    ("family", "role"),
    [(family, role) for family, case in FAMILIES.items() for role in ROLES_INSIDE if role in case],
)
def test_the_parts_of_a_layer_have_their_role(family, role):
    names, paths = names_of(family), members(family)
    for inner in FAMILIES[family][role].split():
        found = [name for path in paths.values() for name in under(f"{path}.{inner}", names)]
        assert found, f"{family} has no {inner}"
        assert {name: by_module(name) for name in found} == dict.fromkeys(found, role)


@every_family
def test_the_parts_around_the_stack_have_their_labels(family):
    names = names_of(family)
    for path, labels in FAMILIES[family].get("around", {}).items():
        found = owned_by(path, names)
        assert found, f"{family} has no {path}"
        assert {(by_layer(name), by_module(name)) for name in found} == {tuple(labels.split())}, path
