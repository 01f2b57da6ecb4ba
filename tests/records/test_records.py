"""Records are frozen pytrees; files are written whole or not at all; annotations are checked under the tests."""

import stat
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from fisherfunc.linalg.gram import gram_of
from fisherfunc.records.record import record
from fisherfunc.records.storage import replacing
from fisherfunc.runtime.versions import versions


@record(static=("name",))
class Point:
    position: torch.Tensor
    name: str


@record()
class Pair:
    left: Point
    right: Point


def point(value: float, name: str = "a") -> Point:
    return Point(position=torch.tensor([value]), name=name)


def test_records_are_frozen_keyword_only_and_compared_by_identity():
    one = point(1.0)
    with pytest.raises(FrozenInstanceError):
        one.name = "b"
    with pytest.raises(TypeError):
        Point(torch.zeros(1), "a")
    assert one == one and one != point(1.0)


def test_tree_map_reaches_the_tensors_of_nested_records_and_nothing_else():
    moved = pytree.tree_map(lambda x: x + 1, Pair(left=point(1.0, "l"), right=point(2.0, "r")))
    assert (moved.left.position.item(), moved.right.position.item()) == (2.0, 3.0)
    assert (moved.left.name, moved.right.name) == ("l", "r")
    leaves, _ = pytree.tree_flatten(moved)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) == 2


def test_static_fields_belong_to_the_structure():
    assert pytree.tree_structure(point(1.0, "a")) == pytree.tree_structure(point(2.0, "a"))
    assert pytree.tree_structure(point(1.0, "a")) != pytree.tree_structure(point(1.0, "b"))


def test_key_paths_name_the_fields():
    paths, _ = pytree.tree_flatten_with_path(Pair(left=point(1.0), right=point(2.0)))
    assert [pytree.keystr(path) for path, _ in paths] == [".left.position", ".right.position"]


def test_records_pass_in_and_out_of_vmap():
    stack = Point(position=torch.arange(6.0).reshape(3, 2), name="a")
    doubled = torch.func.vmap(lambda p: Point(position=2 * p.position, name=p.name + "!"))(stack)
    assert_close(doubled.position, 2 * stack.position, atol=0, rtol=0)
    assert doubled.name == "a!"


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path):
    target = tmp_path / "result.json"
    with replacing(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists() and temporary.suffix == ".json" and temporary.parent == tmp_path
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.read_text() == "whole" and set(tmp_path.iterdir()) == {target, plain}
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, failure):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(failure), replacing(target) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_missing_folder_is_an_error_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "result.json"):
        pytest.fail("the body ran")


def test_versions_are_plain_strings():
    found = versions()
    assert set(found) - {"transformers"} == {"fisherfunc", "torch", "python"}
    assert ("transformers" in found) == ("transformers" in sys.modules)
    assert all(type(version) is str and version for version in found.values())


@pytest.mark.types
def test_annotations_are_checked_under_the_tests():
    with pytest.raises(TypeCheckError):
        gram_of(torch.zeros(3))
