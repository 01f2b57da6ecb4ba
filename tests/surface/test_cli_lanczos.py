"""`fisherfunc spectrum --method lanczos`: leading eigenvalues, held against the exact run; it stops and goes on."""

import json
import os
import time

import pytest
from click.testing import CliRunner
from commands import process as start
from commands import run, tiny
from forward_modes import By, NoForwardMode

import fisherfunc as ff
from fisherfunc.gradients.planning import room
from fisherfunc.pipeline.leading import leading_spectrum
from fisherfunc.surface.cli import cli
from fisherfunc.surface.jobs import leading

FILES = ["eigenvalues.csv", "run.toml", "spectrum.json", "spectrum.png", "spectrum.svg"]
LANCZOS = ["--method", "lanczos", "--leading", 6]


def read(folder):
    return json.loads((folder / "spectrum.json").read_text())


def test_leading_eigenvalues_are_those_of_the_exact_run_within_their_bounds(hub, here):
    task = [*tiny(hub), "--tokens", 70, "--context", 8]
    ran = run(*task, *LANCZOS, "--out", "a")
    assert ran.exit_code == 0, ran.stderr
    assert sorted(os.listdir("a")) == FILES
    assert "within ±" in ran.stdout and "Not certified: that no eigenvalue" in ran.stdout
    exact = run(*task, "--out", "b")
    assert exact.exit_code == 0, exact.stderr
    found, whole = read(here / "a"), read(here / "b")
    values, bounds, true = found["eigenvalues"]["full"], found["full"]["bounds"], whole["eigenvalues"]["full"]
    assert len(values) == 6 and found["per_block"] == {}
    floor = whole["full"]["resolution"]
    assert all(min(abs(value - t) for t in true) <= bound + floor for value, bound in zip(values, bounds, strict=True))
    trace = found["estimates"]["trace"]
    off = abs(trace["value"] - whole["full"]["trace"])
    assert off <= trace["quadrature_error"] + 8 * trace["standard_error"]  # of four probes: 4 in 1,000 are further off
    facts, others = found["metadata"], whole["metadata"]
    assert (facts["method"], others["method"]) == ("lanczos", "exact")
    assert facts["certified"] and facts["estimated"] and facts["not_certified"] and facts["exact"] == []
    for name in ("batch", "num_tokens", "num_rows", "loss", "fisher", "targets", "mean_loss", "normalization", "model"):
        assert facts[name] == pytest.approx(others[name]), name


def test_the_trace_is_exact_where_asked_for(hub, here):
    task = [*tiny(hub), "--tokens", 20, "--context", 8]
    assert run(*task, *LANCZOS, "--trace", "exact", "--out", "a").exit_code == 0
    assert run(*task, "--out", "b").exit_code == 0
    found, trace = read(here / "a"), read(here / "b")["full"]["trace"]
    assert found["estimates"]["trace"]["value"] == pytest.approx(trace, rel=1e-5)  # both of float32 gradients
    assert found["metadata"]["exact"] == ["estimates.trace"] and found["full"]["missed"] < trace


def test_json_and_other_targets(hub, here):
    ran = run(*tiny(hub), *LANCZOS, "--tokens", 9, "--targets", "sampled", "--draws", 2, "--format", "json")
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["metadata"]["num_tokens"], found["metadata"]["num_rows"]) == (9, 18)
    assert found["full"]["num_leading"] == 6


def test_a_command_that_was_killed_goes_on_to_the_same_bits(hub, here, tmp_path):
    plain = ["spectrum", *tiny(hub), *LANCZOS, "--tokens", 170, "--context", 8]
    process = start(*plain, "--resume", "kept", "--out", "a", cwd=here, tmp_path=tmp_path)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(here.glob("kept/leading-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    again = start(*plain, "--resume", "kept", "--out", "b", cwd=here, tmp_path=tmp_path)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    whole = start(*plain, "--out", "c", cwd=here, tmp_path=tmp_path)
    whole.communicate(timeout=120)
    resumed, plain_result = read(here / "b"), read(here / "c")
    assert resumed["metadata"]["resumed_products"] >= 3 > plain_result["metadata"]["resumed_products"]
    assert resumed["eigenvalues"] == plain_result["eigenvalues"] and resumed["full"] == plain_result["full"]
    assert resumed["estimates"] == plain_result["estimates"]


def test_more_eigenvalues_go_on_from_the_same_folder_and_another_text_does_not(hub, here):
    task = [*tiny(hub), "--tokens", 70, "--context", 8, "--method", "lanczos", "--probes", 0, "--resume", "kept"]
    assert run(*task, "--leading", 3, "--out", "a").exit_code == 0
    assert run(*task, "--leading", 6, "--out", "b").exit_code == 0
    assert read(here / "b")["metadata"]["resumed_products"] == read(here / "a")["full"]["num_steps"]
    other = run(*tiny(hub), "--tokens", 60, "--context", 8, *LANCZOS, "--resume", "kept", "--out", "c")
    assert other.exit_code == 1 and "is of another run; these differ" in other.stderr


def test_an_interrupted_command_says_how_to_go_on(hub, here, monkeypatch):
    compute = leading.compute

    def stopped(task, *, progress, **options):
        def report(done, total):
            if done >= 2:
                raise KeyboardInterrupt

        return compute(task, progress=report, **options)

    monkeypatch.setattr(leading, "compute", stopped)
    ran = run(*tiny(hub), *LANCZOS, "--tokens", 30, "--resume", "kept")
    assert (ran.exit_code, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "fisherfunc: interrupted; run the same command again to go on from kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--leading", 3], "--leading is of --method lanczos"),
        (["--trace", "exact"], "--trace is of --method lanczos"),
        (["--method", "lanczos", "--center"], "--center is of --method exact"),
        (["--method", "lanczos", "--blocks", "module"], "--blocks module is of --method exact"),
        (["--method", "lanczos", "--intervals", "jackknife"], "--intervals is of --method exact"),
    ],
)
def test_options_of_the_other_method_are_refused(hub, here, options, message):
    ran = run(*tiny(hub), "--tokens", 9, *options)
    assert ran.exit_code in (1, 2) and message in ran.stderr and os.listdir() == []


def test_an_exact_run_that_cannot_fit_names_lanczos(hub, here, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**5)
    ran = run(*tiny(hub), "--tokens", 70, "--context", 8)
    assert ran.exit_code == 1 and "--method lanczos" in ran.stderr and "70 rows" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_results_of_either_method_share_a_folder_and_are_told_apart(hub, here):
    task = [*tiny(hub), "--tokens", 20, "--context", 8]
    assert run(*task).exit_code == 0
    assert run(*task, *LANCZOS).exit_code == 0  # over the exact result of the same model, with its couplings deleted
    (folder,) = [path for path in here.iterdir() if path.is_dir()]
    assert sorted(os.listdir(folder)) == FILES
    other = run("--model", hub / "bert", "--text", hub / "text.txt", "--tokens", 9)
    assert other.exit_code == 0, other.stderr
    with pytest.raises(ValueError, match="is of --method lanczos, and holds leading eigenvalues alone"):
        ff.surface.files.read_spectrum(folder)
    assert run(*task).exit_code == 0


def test_a_model_without_forward_mode_takes_central_differences_and_says_so():
    import torch

    torch.manual_seed(0)
    model, batch = By(NoForwardMode), (torch.randn(12, 4), torch.randint(3, (12,)))
    found = leading_spectrum(model, batch, num_leading=3, num_probes=0)
    assert found.metadata["derivative"] == "central difference" and found.to_dict()["estimates"] == {}
    exact = ff.fisher_spectrum(model, batch).full
    off = (found.full.eigenvalues[:, None] - exact.eigenvalues).abs().min(dim=1).values
    assert bool((off <= found.full.bounds + exact.resolution).all())


def test_a_sketch_is_marked_in_the_table_the_plot_and_the_files_and_is_repeated(hub, here):
    task = [*tiny(hub), "--tokens", 20, "--context", 8]
    ran = run(*task, "--sketch", 2, "--out", "a")
    assert ran.exit_code == 0, ran.stderr
    assert "approximation: gradients projected by two Kronecker sketches of rank 2, seed 0" in ran.stdout
    assert "± of the sketch alone, full matrix: λ_max" in ran.stdout
    found = read(here / "a")
    assert found["metadata"]["method"] == "sketch" and found["metadata"]["sketch"]["rank"] == 2
    assert not found["full"]["exact"]
    assert "approximate" in (here / "a" / "spectrum.svg").read_text()
    again = CliRunner().invoke(cli, ["run", "a/run.toml", "--out", "b"])
    assert again.exit_code == 0, again.stderr
    assert read(here / "b")["eigenvalues"] == found["eigenvalues"]
    refused = run(*task, "--sketch", 2, "--method", "lanczos")
    assert refused.exit_code == 2 and "--sketch has all eigenvalues" in refused.stderr
    refused = run(*task, "--sketch", 2, "--center")
    assert refused.exit_code == 1 and "--sketch got center beside it" in refused.stderr
