"""The benchmarks are honest: who is wrong gets no time, who cannot is named with the reason, the floor is counted."""

import json
import re
import tomllib
from dataclasses import replace
from itertools import product

import pytest
import torch
from tasks import TASKS

import fisherfunc as ff
from benchmarks import measure as measuring
from benchmarks import run as running
from benchmarks import versions
from benchmarks.__main__ import listing, parser
from benchmarks.contenders import TITLES, contender
from benchmarks.contenders.common import FULL, Answer, CannotError, Options, Work, on_cpu, spectra_of
from benchmarks.floor import Layer, causal_operations, floor_operations
from benchmarks.gemm import gemm_rate
from benchmarks.measure import Measurement, Repeats, judged, measure_task
from benchmarks.oracle import check, oracle, sampled_rows
from benchmarks.plot import plot
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.table import markdown
from benchmarks.targets import deviation, outcomes
from benchmarks.tasks import Task
from benchmarks.workloads import BFLOAT16, FASTEST, OURS, SIZES, WORKLOADS

ONCE = Repeats(most=1)
OWN = ("loop", "vmap", "ours")  # without a library beyond those of the tests


def file_with_oracle(task: Task, folder) -> str:
    truth, path = oracle(task, None), str(folder / "oracle.pt")
    torch.save({"rows": truth.rows, "num_rows": truth.num_rows, "grams": dict(truth.grams)}, path)
    return path


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", [*OWN, "backpack", "nngeometry", "curvlinops"])
def test_a_contender_agrees_with_the_oracle_or_says_why_it_cannot(name, kind, tmp_path):
    task = TASKS[kind]()
    found = measure_task(name, name, task, Options(spectra=kind == "tokens"), ONCE, file_with_oracle(task, tmp_path))
    cannot = (name == "curvlinops") != (kind == "tokens") and name not in OWN
    assert found.status == ("cannot" if cannot else "ok"), found.reason
    assert bool(found.reason) == cannot
    assert cannot or (found.seconds > 0 and found.error < 1e-5 and found.compared.endswith(("eigenvalues", "leading")))


@pytest.mark.parametrize(
    "name, kind", [*product(OWN, ("tokens", "classes")), *product(("backpack", "nngeometry"), ("classes",))]
)
def test_rows_are_numbered_alike_so_that_some_of_them_can_be_compared(name, kind):
    task = TASKS[kind]()
    work = contender(name)(task, Options())
    assert check(on_cpu(work.answer(work.run())), oracle(task, 5)).reason is None


def scaled(grams):
    return {label: 1.01 * gram for label, gram in grams.items()}


def shaken(grams):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(grams[FULL].shape, generator=generator, dtype=torch.float64)
    size = 0.01 * torch.linalg.matrix_norm(grams[FULL], ord=2) / torch.linalg.matrix_norm(noise, ord=2)
    return {**grams, FULL: grams[FULL] + size * (noise + noise.mT) / 2}


def swapped(grams):
    first, second, *_ = grams
    return {**grams, first: grams[second], second: grams[first]}


@pytest.mark.parametrize("wrong", [scaled, shaken, swapped])
def test_a_contender_with_a_wrong_gram_gets_no_time_and_the_table_says_so(wrong, tmp_path, monkeypatch):
    def prepare(task: Task, options: Options) -> Work:
        right = contender("loop")(task, options)
        return replace(right, answer=lambda found: Answer(grams=wrong(right.answer(found).grams)))

    task = TASKS["samples"]()
    truth = file_with_oracle(task, tmp_path)
    monkeypatch.setattr(measuring, "contender", lambda name: prepare)
    found = measure_task("cheat", "cheat", task, Options(), ONCE, truth)
    assert (found.status, found.seconds, found.peak_bytes, found.all_seconds) == ("wrong", None, None, ())
    assert "the oracle's" in found.reason
    assert "cheat: no time, for its eigenvalues are wrong" in markdown(results(found))


def test_wrong_spectra_are_caught_also_where_the_grams_are_right():
    task = TASKS["samples"]()
    truth = oracle(task, None)
    spectra = spectra_of(truth.grams)
    fine = Measurement(label="x", status="ok", seconds=1.0, num_rows=6)
    assert judged(fine, Answer(grams=truth.grams, spectra=spectra), truth).status == "ok"
    leading = {label: values[:2] for label, values in spectra.items()}
    assert judged(fine, Answer(spectra=leading), truth).compared == "2 leading"
    off = {**spectra, FULL: spectra[FULL] * 1.01}
    assert judged(fine, Answer(grams=truth.grams, spectra=off), truth).status == "wrong"
    part = oracle(task, 3)
    assert judged(fine, Answer(grams=truth.grams, spectra=off), part).status == "wrong"
    assert judged(fine, Answer(spectra=off), part).status == "wrong"  # nothing to compare with is not a pass
    assert judged(fine, Answer(grams={FULL: truth.grams[FULL] * torch.nan}), part).status == "wrong"


def test_an_oracle_of_some_rows_is_the_submatrix_and_rows_alone_are_compared_there():
    task = TASKS["tokens"]()
    whole, some = oracle(task, None), oracle(task, 4)
    assert some.rows == sampled_rows(8, 4, 4) and len(some.rows) < 8
    picked = list(some.rows)
    torch.testing.assert_close(some.grams[FULL], whole.grams[FULL][picked][:, picked], rtol=1e-10, atol=1e-12)
    for name in ("loop", "vmap"):
        work = contender(name)(task, Options(rows=some.rows[:2]))
        work.before()
        verdict = check(on_cpu(work.answer(work.run())), some)
        assert verdict.reason is None and verdict.compared == "2 rows"


def test_the_oracle_is_what_the_package_finds():
    task = TASKS["tokens"]()
    want = ff.fisher_spectrum(task.model, task.batch, dtype=torch.float64, blocks=ff.by_layer)
    for label, gram in oracle(task, None).grams.items():
        spectrum = want.full if label == FULL else want.blocks[label]
        got = torch.linalg.eigvalsh(gram).flip(-1) / task.num_rows
        torch.testing.assert_close(got[: len(spectrum.eigenvalues)], spectrum.eigenvalues, rtol=1e-7, atol=1e-10)


def test_the_floor_of_a_hand_counted_perceptron():
    task = replace(TASKS["samples"](), inputs=torch.zeros(6, 5))  # 5-4-3, 6 samples
    assert floor_operations(task) == {
        "backward": 2 * 6 * (5 * 4),
        "contraction": 6**2 * (5 + 4) + 6**2 * (4 + 3),
        "total": 240 + 324 + 252,
    }


def test_the_floor_forms_gradients_where_that_is_cheaper():
    floor = floor_operations(TASKS["images"]())  # 1 → 2 channels, 3 × 3, 16 positions; then 8 → 3
    assert floor["contraction"] == 2 * 6 * 16 * 18 + 36 * 18 + 36 * (8 + 3)
    assert floor["backward"] == 2 * 6 * 18 * 16


def test_the_floor_of_a_causal_model_counts_prefixes():
    width, outputs = 8, 24 + 8 + 32 + 8
    weights = width * (24 + 8 + 32) + 32 * 8
    assert floor_operations(TASKS["tokens"]()) == {
        "backward": 2 * weights * 2 * (1 + 2 + 3 + 4),
        "contraction": 8**2 * 4 * outputs,
        "total": 40 * weights + 256 * outputs,
    }


def test_the_floor_of_gpt2_is_the_one_of_the_design():
    shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12 + [(768, 50257)]
    layers = [Layer(name="", d_in=d_in, d_out=d_out, positions=64) for d_in, d_out in shapes]
    floor = causal_operations(layers, sequences=16, span=63)
    assert floor["backward"] / 1e12 == pytest.approx(5.5, rel=0.02)
    assert floor["contraction"] / 1e12 == pytest.approx(5.4, rel=0.02)


def results(*measured: Measurement, targets: tuple = (), scaling: tuple = (), gpu: str | None = None) -> dict:
    workload = {
        "name": "w",
        "title": "A workload",
        "sizes": {"samples": 6},
        "num_rows": 6,
        "num_params": 39,
        "oracle_rows": 6,
        "floor_operations": {"backward": 4, "contraction": 6, "total": 10},
        "measurements": [found.to_dict() for found in measured],
        "targets": [{"ours": OURS, **target} for target in targets],
    }
    machine = {"processor": "p", "cores": 2, "threads": 1, "memory_bytes": 2**30, "python": "3", "gpu": gpu}
    rates = {"float32": 5.0}
    facts = {"size": "quick", "machine": machine, "versions": {"torch": "2", "jax": None}, "gemm_rates": rates}
    return {**facts, "workloads": [outcomes(workload, rates)], "scaling": list(scaling)}


def timed(label: str, seconds: float, **facts) -> Measurement:
    return Measurement(label=label, status="ok", seconds=seconds, num_rows=6, peak_bytes=2**20, **facts)


def test_targets_are_ratios_of_the_run_and_survive_json():
    spectra = [{"b": {"leading": [2.0, 1.0], "trace": 3.0}}, {"b": {"leading": [2.0, 1.1], "trace": 3.1}}]
    found = results(
        timed(OURS, 4.0, spectra=spectra[0]),
        replace(timed("part", 1.0), num_rows=1),
        timed("slow", 40.0),
        timed(BFLOAT16, 2.0, spectra=spectra[1]),
        targets=(
            {"reference": "slow", "quantity": "speed", "bound": 5},
            {"reference": "part", "quantity": "speed", "bound": 2},
            {"reference": FASTEST, "quantity": "speed", "bound": 1},
            {"reference": None, "quantity": "floor", "bound": 0.6},
            {"reference": None, "quantity": "peak", "bound": 2**20},
            {"reference": "slow", "quantity": "memory", "bound": 0.5},
            {"ours": BFLOAT16, "reference": OURS, "quantity": "deviation", "bound": 0.01},
            {"reference": "absent", "quantity": "speed", "bound": 1},
        ),
    )
    assert json.loads(json.dumps(found)) == found
    targets = found["workloads"][0]["targets"]
    assert [target["measured"] for target in targets[:6]] == pytest.approx([10, 1.5, 0.5, 0.5, 2**20, 1])
    assert [target["met"] for target in targets] == [True, False, False, False, True, False, False, None]
    assert targets[6]["measured"] == pytest.approx(0.1) == deviation(spectra[1], spectra[0])
    assert [target["at_floor"] for target in targets[:4]] == [pytest.approx(20), pytest.approx(3), 1.0, None]
    table = markdown(found)
    assert "absent did not run" in table and "| met |" in table and "| not met |" in table
    elsewhere = markdown({**found, "machine": {**found["machine"], "gpu": "G"}})
    assert "\nG; p, 2 cores" in elsewhere and "met |" not in elsewhere and "| ≥ " not in elsewhere


def test_the_table_gives_the_reason_of_a_contender_that_cannot(monkeypatch):
    def refuses(task: Task, options: Options) -> Work:
        raise CannotError("knows no | layers")

    def breaks(task: Task, options: Options) -> Work:
        raise ImportError("No module named 'jax'")

    for prepare, said in ((refuses, "knows no | layers"), (breaks, "No module named 'jax'")):
        monkeypatch.setattr(measuring, "contender", lambda name, prepare=prepare: prepare)
        found = measure_task("neighbour", "neighbour", TASKS["samples"](), Options(), ONCE, None)
        table = markdown(results(found, timed(OURS, 1.0)))
        assert f"- neighbour: {said}" in table.replace("not installed, or not importable: ", "")
        assert "| neighbour |  |  | cannot |" in table


def test_a_workload_that_cannot_be_built_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "in_fresh_process", lambda function, *args, limit_s: refuse())

    def refuse():
        raise DiedError("ModuleNotFoundError: No module named 'sklearn'")

    found = running._workload(WORKLOADS[-1], "quick", None, "cpu", tmp_path, lambda text: None)
    table = markdown({**results(), "workloads": [outcomes(found, {"float32": 1.0})]})
    assert "Did not run: ModuleNotFoundError: No module named 'sklearn'" in table


def test_the_plot_and_the_sweep_table_show_every_series(tmp_path):
    facts = {"status": "ok", "error": 1e-7}
    points = [
        {"num_rows": n, "num_params": 10 * n, "seconds": n / 9, "peak_bytes": n * 2**20, "floor_operations": n, **facts}
        for n in (2, 4, 8)
    ]
    lost = {**points[0], "seconds": None, "peak_bytes": None, "status": "wrong"}
    series = [
        {"axis": axis, "contender": who, "points": [*points, lost], "reason": None}
        for axis in ("num_rows", "num_params")
        for who in ("loop", OURS)
    ]
    found = results(timed(OURS, 1.0), scaling=tuple(series))
    png, svg = plot(found, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    assert "<svg" in svg.read_text() and svg.stat().st_size > 10_000
    assert markdown(found).count("| loop |") == 8


def test_the_rate_of_matrix_products_is_positive():
    assert 1e6 < gemm_rate(torch.float32, size=64, seconds=0.0) < 1e15


def test_a_fresh_process_returns_or_says_how_it_died():
    assert in_fresh_process(sorted, [2, 1], limit_s=60) == [1, 2]
    with pytest.raises(DiedError, match="ZeroDivisionError"):
        in_fresh_process(divmod, 1, 0, limit_s=60)


def test_every_workload_has_both_sizes_known_contenders_and_targets_that_name_them():
    for workload in WORKLOADS:
        for size in SIZES:
            labels = {entry.label for entry in workload.entries[size]}
            assert {entry.name for entry in workload.entries[size]} <= set(TITLES)
            assert {target.ours for target in workload.targets[size]} <= labels
            assert {target.reference for target in workload.targets[size]} <= labels | {None, FASTEST}
            assert workload.sizes[size] and size in workload.sample
        assert f"  {workload.name}: " in listing("quick")
    assert parser().parse_args(["--only", "cnn", "scaling", "--contenders", "ours"]).only == ["cnn", "scaling"]


def test_the_tests_that_versions_are_tried_by_are_there():
    assert [path for path in versions.TESTS if not (versions.ROOT / path).exists()] == []


def test_the_versions_that_pyproject_toml_allows_from_are_those_that_the_tests_were_run_on():
    page = (versions.ROOT / "docs" / "how-to" / "reproduce.md").read_text(encoding="utf-8")
    pairs = re.findall(r"^\| (3\.\d+) \| (\d+\.\d+\.\d+) \| .*(?:passed|gate) \|$", page, re.MULTILINE)
    project = tomllib.loads((versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=")
    named = [one.split()[-1] for one in project["classifiers"] if "Python :: 3." in one]
    assert sorted({python for python, _ in pairs}) == named == list(versions.PYTHONS) and named[0] == oldest
    assert [torch for python, torch in pairs if python == oldest] == list(versions.torches())
