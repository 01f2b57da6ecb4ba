"""Known science at small size, by the functions of notebooks/known_science.ipynb, and these against closed forms."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import REPOSITORY

import fisherfunc as ff

NOTEBOOK = REPOSITORY / "notebooks" / "known_science.ipynb"


def definitions() -> SimpleNamespace:
    """What the notebook's cells with the tag "definitions" define."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    chosen = ["".join(cell["source"]) for cell in cells if "definitions" in cell["metadata"].get("tags", ())]
    names: dict = {}
    exec(compile("\n".join(chosen), str(NOTEBOOK), "exec"), names)
    return SimpleNamespace(**names)


science = definitions()


# Marchenko and Pastur 1967


@pytest.mark.parametrize("ratio", [0.3, 2.0])
def test_the_law_has_the_moments_of_the_law(ratio):
    """Of all P eigenvalues the mean is 1 and the mean square 1 + P/N; min(1, N/P) of them are nonzero."""
    grid, density, integral = science.marchenko_pastur(ratio)
    nonzero = min(1, 1 / ratio)
    assert integral[-1] == pytest.approx(1, abs=1e-5)
    assert np.trapezoid(density * grid, grid) * nonzero == pytest.approx(1, abs=1e-5)
    assert np.trapezoid(density * grid**2, grid) * nonzero == pytest.approx(1 + ratio, abs=1e-5)


@pytest.mark.parametrize(("num_rows", "num_params"), [(400, 200), (200, 400)])
def test_gaussian_rows_follow_the_law_and_those_of_the_empirical_fisher_do_not(num_rows, num_params):
    ratio, weights = num_params / num_rows, torch.zeros(num_params, dtype=torch.float64)

    def eigenvalues(targets):
        return science.linear_regression(num_rows, weights, noise=1.0, targets=targets).numpy()

    true, empirical = eigenvalues(ff.targets.all_classes()), eigenvalues(ff.targets.observed())
    edge = (1 + math.sqrt(ratio)) ** 2
    assert len(true) == min(num_rows, num_params) and true[0] == pytest.approx(edge, rel=0.04)
    assert science.distance_to_law(true, ratio) < 0.02
    assert science.distance_to_law(empirical, ratio) > 0.1 and empirical[0] > 1.5 * edge


# Sagun et al. 2017, Papyan 2020


def rows_of(model, inputs):
    """∇ log p_c of each sample and class by a loop of backward passes: (n, c, P); and p."""
    log_p = model(inputs).log_softmax(dim=-1)
    parameters = list(model.parameters())

    def row(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    return torch.stack([torch.stack([row(value) for value in sample]) for sample in log_p]), log_p.detach().exp()


@pytest.fixture(scope="module")
def small():
    """30 digits, three a class, and a trained model of 360 parameters: rows by a loop, and the Gram of the pass."""
    inputs, classes = science.digits()
    chosen = torch.cat([torch.where(classes == c)[0][:3] for c in range(10)])
    inputs, classes = inputs[chosen], classes[chosen]
    model = science.classifier(4)
    next(science.training(model, inputs, classes, (40,)))
    rows, p = rows_of(model, inputs)
    gram, found_p = science.true_fisher(model, inputs, classes)
    torch.testing.assert_close(found_p, p)
    return SimpleNamespace(model=model, inputs=inputs, classes=classes, rows=rows, p=p, gram=gram)


def test_the_parts_are_papyans_and_add_up_to_the_true_fisher(small):
    num, p, rows = len(small.p), small.p, small.rows
    outer = torch.einsum
    weight, mean, within = {}, {}, 0
    for c in range(10):
        members = small.classes == c
        for t in range(10):
            share = p[members, t]
            weight[c, t] = share.sum() / num
            mean[c, t] = (share[:, None] * rows[members, t]).sum(0) / share.sum()
            apart = rows[members, t] - mean[c, t]
            within = within + outer("n,np,nq->pq", share / num, apart, apart)
    class_mean, of_class = {}, {}
    for c in range(10):
        of_class[c] = sum(weight[c, t] for t in range(10) if t != c)
        class_mean[c] = sum(weight[c, t] * mean[c, t] for t in range(10) if t != c) / of_class[c]
    pairs = [(c, t) for c in range(10) for t in range(10) if t != c]
    expected = {
        "class means": sum(of_class[c] * torch.outer(class_mean[c], class_mean[c]) for c in range(10)),
        "cross-class": sum(
            weight[c, t] * torch.outer(mean[c, t] - class_mean[c], mean[c, t] - class_mean[c]) for c, t in pairs
        ),
        "own class": sum(weight[c, c] * torch.outer(mean[c, c], mean[c, c]) for c in range(10)),
    }
    fisher = outer("nc,ncp,ncq->pq", p / num, rows, rows)
    torch.testing.assert_close(sum(expected.values()) + within, fisher)
    flat = (p.sqrt()[..., None] * rows).flatten(0, 1)
    parts = science.cross_class_parts(p, small.classes)
    assert {name: len(part) for name, part in parts.items()} == {"class means": 10, "cross-class": 90, "own class": 10}
    for name, part in parts.items():
        torch.testing.assert_close((part @ flat).T @ (part @ flat), expected[name])
        found = science.eigenvalues_of(part @ small.gram @ part.T)
        largest = torch.linalg.eigvalsh(expected[name]).flip(0)[: len(part)]
        torch.testing.assert_close(found, largest, atol=1e-10 * largest[0].item(), rtol=1e-6)


def test_the_share_in_a_span_is_that_of_an_orthonormal_basis(small):
    flat = (small.p.sqrt()[..., None] * small.rows).flatten(0, 1)
    part = science.cross_class_parts(small.p, small.classes)["class means"]
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    basis = torch.linalg.qr((part @ flat).T).Q
    values, of_gram = torch.linalg.eigh(small.gram)
    values, of_gram = values.flip(0)[:8], of_gram.flip(1)[:, :8]
    share = science.share_in_span(part, small.gram, values, of_gram)
    torch.testing.assert_close(share, (basis.T @ vectors.flip(1)[:, :8]).square().sum(0), rtol=1e-5, atol=1e-5)


def test_a_gap_is_found_where_it_is():
    assert science.largest_gap(torch.tensor([9.0, 8.0, 7.0, 1.0, 0.9, 0.8]), among=5) == (3, 7.0)


@pytest.fixture(scope="module")
def stages():
    """Of 60 digits: the Gram, p, the eigenvalues and the parts' eigenvalues, before, early in, and after training."""
    inputs, classes = science.digits()
    probe = torch.cat([torch.where(classes == c)[0][:6] for c in range(10)])
    model, found = science.classifier(32), {}
    for step in science.training(model, inputs, classes, (0, 10, 40, 1000)):
        gram, p = science.true_fisher(model, inputs[probe], classes[probe])
        parts = science.cross_class_parts(p, classes[probe])
        parts["all means"] = torch.cat(list(parts.values()))
        of_parts = {name: science.eigenvalues_of(part @ gram @ part.T) for name, part in parts.items()}
        values = science.eigenvalues_of(gram / len(probe))
        found[step] = SimpleNamespace(gram=gram, p=p, classes=classes[probe], values=values, parts=of_parts)
    return found


def test_outliers_are_one_fewer_than_classes_at_first_and_about_as_many_while_classes_are_learned(stages):
    for step in (0, 10):
        place, ratio = science.largest_gap(stages[step].values)
        assert place == 9 and ratio > 6
    place, ratio = science.largest_gap(stages[40].values)
    assert 8 <= place <= 10 and ratio > 1.4


def test_the_means_make_the_outliers_and_training_their_hierarchy(stages):
    for stage in stages.values():
        assert 0.85 < stage.parts["all means"][0] / stage.values[0] <= 1 + 1e-9
    before, after = stages[0].parts, stages[1000].parts
    assert before["class means"][0] < 0.1 * before["cross-class"][0]
    assert after["class means"][0] > 1.3 * after["cross-class"][0]


# Kunstner, Hennig and Balles 2019


def test_both_fishers_are_what_their_matrices_say(small):
    num, p = len(small.p), small.p
    own = small.rows[torch.arange(num), small.classes]
    empirical, true = own.T @ own / num, torch.einsum("nc,ncp,ncq->pq", p / num, small.rows, small.rows)
    largest = {"empirical": torch.linalg.eigvalsh(empirical)[-1], "true": torch.linalg.eigvalsh(true)[-1]}

    def step(matrix, damping):
        return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=p.dtype), own.mean(dim=0))

    steps = step(empirical, 0.01 * largest["empirical"]), step(true, 0.01 * largest["true"])
    expected = {
        "trace, empirical": empirical.trace(),
        "trace, true": true.trace(),
        "λ_max, empirical": largest["empirical"],
        "λ_max, true": largest["true"],
        "cosine": torch.cosine_similarity(empirical.flatten(), true.flatten(), dim=0),
        "distance": (empirical - true).norm() / true.norm(),
        "cosine of steps": torch.cosine_similarity(*steps, dim=0),
    }
    found = science.both_fishers(small.gram, p, small.classes, largest["true"], damping=0.01)
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    by_package = ff.fisher_spectrum(small.model, (small.inputs, small.classes)).full
    torch.testing.assert_close(by_package.eigenvalues[0], largest["empirical"], rtol=1e-6, atol=0)


def test_the_empirical_fisher_is_like_the_true_one_before_training_and_vanishes_beside_it_after(stages):
    both = {
        step: science.both_fishers(stage.gram, stage.p, stage.classes, stage.values[0])
        for step, stage in stages.items()
    }
    ratio = {step: values["trace, empirical"] / values["trace, true"] for step, values in both.items()}
    assert ratio[0] == pytest.approx(1, abs=0.05) and both[0]["cosine"] > 0.8
    assert ratio[1000] < 0.1 and both[1000]["distance"] > 0.8


@pytest.mark.parametrize(("distance", "noise"), [(0.0, 1.0), (2.0, 1.0), (0.0, 2.0)])
def test_in_a_linear_regression_only_the_right_model_at_its_minimum_has_equal_fishers(distance, noise):
    weights = torch.tensor([distance, 0.0], dtype=torch.float64)
    empirical = science.linear_regression(1000, weights, noise=noise, targets=ff.targets.observed())
    true = science.linear_regression(1000, weights, noise=noise, targets=ff.targets.all_classes())
    expected = [noise**2 + 3 * distance**2, noise**2 + distance**2]
    assert empirical.tolist() == pytest.approx(expected, rel=0.25)  # 1000 fourth powers of Gaussians
    assert true.tolist() == pytest.approx([1, 1], rel=0.1)


# Karakida, Akaho and Amari 2019


def test_kappas_of_linear_and_relu_networks_are_those_of_closed_forms():
    assert science.kappas("linear", 3) == pytest.approx([(1 + 1.1 + 1.2) / 2, (0 + 0.1 + 0.2) / 2], rel=1e-6)

    def relu(q, x):  # Cho and Saul 2009
        angle = math.acos(x / q)
        return q * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi), (1 - angle / math.pi) / 2

    for of_itself, found in zip((True, False), science.kappas("ReLU", 3), strict=True):
        own, cross, forward, slopes = 1.0, 1.0 if of_itself else 0.0, [1.0 if of_itself else 0.0], []
        for _ in range(2):
            q, x = 2 * own + 0.1, 2 * cross + 0.1
            (cross, slope), own = relu(q, x), q / 2
            forward.append(cross)
            slopes.append(2 * slope)
        backward = [slopes[0] * slopes[1], slopes[1], 1.0]
        expected = sum(d * h for d, h in zip(backward, forward, strict=True)) / 2
        assert found == pytest.approx(expected, rel=1e-3)


def test_expectations_of_tanh_are_those_of_many_draws():
    generator = torch.Generator().manual_seed(0)
    common, one, other = torch.randn(3, 400_000, generator=generator, dtype=torch.float64)
    first, second = (math.sqrt(0.6) * common + math.sqrt(2.4) * own for own in (one, other))
    drawn = (first.tanh() * second.tanh()).mean().item()
    assert science.correlated(np.tanh, 3.0, 0.6) == pytest.approx(drawn, abs=0.004)


@pytest.mark.parametrize("activation", ["tanh", "ReLU", "linear"])
def test_wide_random_networks_have_the_moments_and_the_largest_eigenvalue_of_the_theory(activation):
    size, widths = {"num_outputs": 2, "num_samples": 40}, (100, 400)
    found = {
        width: [science.random_network(activation, width=width, seed=seed, **size) for seed in range(4)]
        for width in widths
    }
    means = {w: {name: np.mean([f[name] for f in networks]) for name in networks[0]} for w, networks in found.items()}
    theory = {width: science.theory(activation, width=width, **size) for width in widths}
    assert means[400]["mean"] == pytest.approx(theory[400]["mean"], rel=0.06)
    assert means[400]["second moment"] == pytest.approx(theory[400]["second moment"], rel=0.15)
    assert means[400]["mean of the C largest"] == pytest.approx(theory[400]["largest"], rel=0.1)
    assert means[400]["largest"] == pytest.approx(theory[400]["largest"], rel=0.15)
    small, large = (means[width] for width in widths)
    slopes = {name: math.log(large[name] / small[name]) / math.log(4) for name in ("mean", "second moment", "largest")}
    assert slopes == pytest.approx({"mean": -1, "second moment": 0, "largest": 1}, abs=0.3)


def test_outputs_split_the_largest_eigenvalue():
    """Where the theory and a network differ: C equal eigenvalues in the limit, unequal ones at finite width."""
    network = science.random_network("tanh", width=128, num_outputs=8, num_samples=40)
    predicted = science.theory("tanh", width=128, num_outputs=8, num_samples=40)["largest"]
    assert network["largest"] > 1.1 * network["mean of the C largest"]
    assert abs(network["mean of the C largest"] / predicted - 1) < abs(network["largest"] / predicted - 1)


# One hidden layer: the claim of Pennington and Worah 2018, and a law derived in the notebook


def test_the_law_of_one_hidden_layer_has_the_moments_of_its_matrices_and_half_zeros_where_linear():
    for activation, (eta, eta_slope, zeta) in {
        "linear": (1, 1, 1),
        "ReLU": (0.5 - 1 / (2 * math.pi), 0.5, 0.25),
    }.items():
        law = science.hidden_layer_law(activation)
        assert law.mean() == pytest.approx((eta + eta_slope) / 2, rel=2e-3)
        assert np.mean(law**2) == pytest.approx((eta**2 + eta_slope**2 + 4 * zeta**2) / 2, rel=5e-3)
        assert law.min() > min(eta, eta_slope) - zeta - 1e-3
    assert np.mean(science.hidden_layer_law("linear") < 1e-9) == pytest.approx(0.5, abs=1e-3)


def test_the_fisher_of_one_hidden_layer_is_that_of_a_loop_of_backward_passes():
    found = science.hidden_layer_fisher("tanh", width=3, num_samples=20)
    torch.manual_seed(0)
    weights = [torch.nn.Linear(3, 3, bias=False).weight for _ in range(2)]
    for weight in weights:
        torch.nn.init.normal_(weight, std=3**-0.5)
    inputs = torch.randn(20, 3).double()
    first, second = (weight.detach().double().requires_grad_() for weight in weights)
    outputs = (inputs @ first.T).tanh() @ second.T
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(y, (first, second), retain_graph=True)])
            for y in outputs.flatten()
        ]
    )
    np.testing.assert_allclose(found, (rows.T @ rows / 20).numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "at_four", "at_ten"), [("linear", 0.2, 0.12), ("ReLU", 0.5, 0.28), ("tanh", 0.5, 0.28)]
)
def test_one_hidden_layer_comes_closer_to_the_law_as_it_widens(activation, at_four, at_ten):
    law = science.hidden_layer_law(activation)
    for width, most in ((4, at_four), (10, at_ten)):
        fishers = [science.hidden_layer_fisher(activation, width=width, num_samples=600, seed=s) for s in range(3)]
        away = [science.distance_to_hidden_layer_law(np.linalg.eigvalsh(fisher), law) for fisher in fishers]
        assert np.mean(away) < most, away
