"""The profile is honest: sections give exclusive times that add up to the run, nothing stays patched, none is lost."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from tasks import TASKS

from benchmarks.contenders import ours
from benchmarks.contenders.common import Options
from benchmarks.floor import floor_operations, floor_parts
from benchmarks.profile import REST, by_title, main, own_entries, table
from benchmarks.sections import FLOOR, SECTIONS, Section, timed_by
from benchmarks.stopwatch import Stopwatch
from benchmarks.workloads import BFLOAT16, OURS, WORKLOADS

TITLES = list(dict.fromkeys(section.title for section in SECTIONS))


class Clock:
    """A clock that stands still unless work is done."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def module_of(clock: Clock) -> ModuleType:
    """`outer` takes 1 + 4 s itself, `inner` 2 s each of two times, `items` 8 s a step and 16 s at its end."""
    module = ModuleType("synthetic")

    def inner() -> str:
        clock.work(2)
        return "inner"

    def items() -> Iterator[str]:
        for _ in range(3):
            clock.work(8)
            yield module.inner()
        clock.work(16)

    def outer() -> list[str]:
        clock.work(1)
        found = [module.inner()]
        for item in module.items():
            clock.work(4)
            found.append(item)
        return found

    def fails() -> None:
        clock.work(32)
        raise KeyError("fails")

    vars(module).update(inner=inner, items=items, outer=outer, fails=fails)
    return module


def sections_of(module: ModuleType, *names: str, opaque: str = "") -> list[Section]:
    return [Section(owner=module, name=name, title=name, opaque=name == opaque) for name in names]


def test_nested_sections_give_exclusive_times_that_sum_to_the_total():
    clock = Clock()
    watch, module = Stopwatch(clock), module_of(clock)
    with timed_by(watch, sections_of(module, "inner", "items", "outer")):
        begin = clock()
        assert module.outer() == ["inner"] * 4  # what is timed gives what it gave
        total = clock() - begin
    assert watch.seconds == {"outer": 1 + 3 * 4, "inner": 4 * 2, "items": 3 * 8 + 16}
    assert sum(watch.seconds.values()) == total


def test_all_that_an_opaque_section_calls_counts_to_it():
    clock = Clock()
    watch, module = Stopwatch(clock), module_of(clock)
    with timed_by(watch, sections_of(module, "inner", "items", "outer", opaque="outer")):
        module.outer()
        module.inner()
    assert watch.seconds == {"outer": 1 + 3 * 4 + 4 * 2 + 3 * 8 + 16, "inner": 2}


def test_what_runs_in_another_thread_is_not_counted_twice():
    clock = Clock()
    watch, module = Stopwatch(clock), module_of(clock)
    with ThreadPoolExecutor(1) as pool, timed_by(watch, sections_of(module, "inner")), watch.section("waiting"):
        assert pool.submit(lambda: module.inner()).result() == "inner"
    assert watch.seconds == {"waiting": 2}


def test_a_section_ends_where_its_function_fails():
    clock = Clock()
    watch, module = Stopwatch(clock), module_of(clock)
    with timed_by(watch, sections_of(module, "inner", "fails")):
        with pytest.raises(KeyError, match="fails"):
            module.fails()
        clock.work(64)  # in no section
        module.inner()
    assert watch.seconds == {"fails": 32, "inner": 2}


def functions() -> list[object]:
    return [getattr(section.owner, section.name) for section in SECTIONS]


def test_sections_restore_what_they_patched():
    before = functions()
    with pytest.raises(KeyError, match="inside"), timed_by(Stopwatch()):
        assert not {*map(id, before)} & {*map(id, functions())}
        raise KeyError("inside")
    assert all(one is other for one, other in zip(functions(), before, strict=True))


def test_a_function_that_is_gone_is_an_error_and_nothing_stays_patched():
    module = module_of(Clock())
    inner = module.inner
    with pytest.raises(AttributeError, match="gone"), timed_by(Stopwatch(), sections_of(module, "inner", "gone")):
        pass
    assert module.inner is inner


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_enters_the_sections_and_its_result_is_the_same(kind):
    task, watch = TASKS[kind](), Stopwatch()
    want = ours.prepare(task, Options(spectra=True)).run()[0].block()
    with timed_by(watch):
        grams, _ = ours.prepare(task, Options(spectra=True)).run()
    assert bool((grams.block() == want).all())
    missing = {"what the dense route takes"} | (set() if kind == "tokens" else {"forward passes of prefixes"})
    assert set(TITLES) - set(watch.seconds) == missing


@pytest.mark.parametrize("kind", TASKS)
def test_the_parts_of_the_floor_sum_to_it(kind):
    task = TASKS[kind]()
    parts, whole = floor_parts(task), floor_operations(task)
    assert sum(parts.values()) == whole["total"] == whole["backward"] + whole["contraction"]
    assert set(parts) == set(FLOOR.values()) and set(FLOOR) <= set(TITLES)
    assert parts["forming"] == (2 * 6 * 16 * 18 if kind == "images" else 0)


def test_what_no_section_took_is_the_rest_and_stands_at_the_end():
    found = by_title({TITLES[-1]: 1.0, TITLES[0]: 2.0}, 4.0)
    assert list(found) == [*TITLES, REST]
    assert (found[REST], sum(found.values())) == (1.0, 4.0)


def test_the_table_has_the_seconds_of_the_floor_and_its_rate():
    floor = {"backward": 10, "forming": 0, "contraction": 5}
    facts = {"seconds": 6.0, "dtype": "float32", "gemm_rate": 5.0, "floor_operations": floor}
    shown = table({**facts, "sections": by_title(dict.fromkeys(FLOOR, 1.5), 6.0)})
    assert "| backward passes | 1.5 | 25.0 % | 2 |" in shown
    assert "| factors taken out of them | 1.5 | 25.0 % | – |" in shown
    assert "| rest | 1.5 | 25.0 % | – |" in shown
    assert "| --- | ---: | ---: | ---: |" in shown
    assert "Total 6 s; floor 3 s at 0 GFLOP/s in float32: 0.50 of the floor's rate." in shown


def test_the_first_entry_of_ours_in_each_dtype_is_profiled():
    labels = {w.name: [entry.label for entry in own_entries(w, "full")] for w in WORKLOADS}
    assert labels["gpt2-124m-bfloat16"] == [OURS, BFLOAT16]
    assert labels["gpt2-124m-long"] == [f"{OURS}, memory_limit=4 GB"]
    assert all(len(found) == 1 for name, found in labels.items() if name != "gpt2-124m-bfloat16")


def test_the_command_shows_all_sections_and_writes_them(tmp_path, capsys):
    main(["--quick", "--only", "mlp", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "profile.md").read_text() + "\n"
    rows = [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines() if line.startswith("| ")]
    assert rows == ["section", "---", *TITLES, REST]
    (found,) = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert sum(found["sections"].values()) == pytest.approx(found["seconds"])
    assert min(found["sections"].values()) >= 0
