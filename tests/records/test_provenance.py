"""What results say of how they came about."""

import ast
import json
import pickle
from dataclasses import fields
from pathlib import Path

import pytest

import fisherfunc as ff
from fisherfunc.records.provenance import Provenance

PACKAGE = Path(ff.__file__).parent


def test_what_is_said_survives_json_and_what_is_not_said_is_left_out():
    said = Provenance(fisher="empirical", given_up={}, seed=0, centered=False, clusters=None, more={"mine": [1, "a"]})
    found = said.to_dict()
    kept = {"fisher": "empirical", "given_up": {}, "seed": 0, "centered": False, "clusters": None}
    assert found == {**kept, "mine": [1, "a"]}
    assert Provenance.from_dict(json.loads(json.dumps(found))) == said


def test_of_what_two_say_the_second_counts():
    one, other = Provenance(loss="a", seed=1, more={"x": 1, "y": 1}), Provenance(seed=0, unit="token", more={"y": 2})
    assert one | other == Provenance(loss="a", seed=0, unit="token", more={"x": 1, "y": 2})
    assert one | Provenance() == one == Provenance() | one
    assert (Provenance(clusters="x") | Provenance(clusters=None)).to_dict() == {"clusters": None}
    with pytest.raises(TypeError, match="unsupported operand"):
        one | {"seed": 2}


def test_what_is_no_answer_survives_a_pickle():
    assert pickle.loads(pickle.dumps(Provenance(seed=1))).to_dict() == {"seed": 1} and not Provenance().self_check


def test_an_unknown_name_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        Provenance(sed=1)
    with pytest.raises(ValueError, match=r"names of your own, got \['seed'\]"):
        Provenance(seed=1, more={"seed": 2})


def looked_up(tree: ast.AST) -> list[str]:
    """What is taken out of metadata by a key."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            held, keys = node.value, [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            held, keys = node.func.value, node.args[:1]
        else:
            continue
        name = held.attr if isinstance(held, ast.Attribute) else getattr(held, "id", "")
        if name in ("metadata", "provenance"):
            found += [str(key.value) for key in keys if isinstance(key, ast.Constant)]
    return found


def test_no_name_is_spelled_as_a_key_in_the_package():
    names = {field.name for field in fields(Provenance)}
    files = {path: looked_up(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    spelled = {str(path.relative_to(PACKAGE)): sorted(names & set(keys)) for path, keys in files.items()}
    assert {path: keys for path, keys in spelled.items() if keys} == {}
    assert looked_up(ast.parse('a.metadata["loss"], metadata.get("seed")')) == ["loss", "seed"]
