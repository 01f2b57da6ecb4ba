"""Sums over all eigenvalues of F = (1/N) Gᵀ G without the eigenvalues: tr f(F) by Lanczos quadrature of random probes.

For random signs u, E[uᵀ f(A) u] = tr f(A), A = K/N (Hutchinson 1989); and uᵀ f(A) u is an integral of f by a measure
of which m Lanczos steps from u give the Gauss rule, and with one node set at t the Gauss–Radau rule (Golub and Meurant,
"Matrices, moments and quadrature", 1994). Where the derivatives of f of even order from 2 on are negative and those of
odd order positive on (0, ∞), Gauss is an upper bound, and Radau with a node at 0 a lower one: of x/(x + γ),
log(1 + x/γ) and −x log x. For the number of eigenvalues above t the rules with a node at t bound from both sides
(Chebyshev, Markov and Stieltjes). Axis order: probes `r`, steps `m`, nodes `k`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.krylov.krylov import FEW_ROWS, Krylov, Step, grow, measured_round_off
from fisherfunc.linalg.krylov.token_operator import TokenOperator
from fisherfunc.records.axes import Progress

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that probes estimate.

    Attributes:
        value: The mean over probes of the middle of their bounds.
        quadrature_error: Half the mean distance of these bounds, with what round-off may add: how far `value` is at
            most from what the same probes would give by the exact matrix.
        standard_error: Of the mean over probes; NaN of one probe.
        low: The lower end of a 95 % interval, by both errors.
        high: The upper end.
    """

    value: float
    quadrature_error: float
    standard_error: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain Python values; None where there is no number."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """The tridiagonal matrix of one probe.

    Attributes:
        diagonal: `(m,)`.
        beside: `(m,)`, the entries beside the diagonal, and at last the norm of the remainder.
    """

    diagonal: Float[Tensor, " m"]
    beside: Float[Tensor, " m"]

    def gauss(self) -> tuple[Tensor, Tensor]:
        """The nodes and weights of the Gauss rule."""
        return _nodes(self.diagonal, self.beside[:-1])

    def radau(self, node: float) -> tuple[Tensor, Tensor]:
        """The nodes and weights of the Gauss–Radau rule with one node given; Gauss where that is exact."""
        values, vectors = torch.linalg.eigh(_tridiagonal(self.diagonal, self.beside[:-1]))
        apart = values - node
        if float(self.beside[-1]) == 0.0 or bool((apart == 0).any()):  # t is a node of the Gauss rule already
            return values, vectors[0].square()
        last = node + self.beside[-1].square() * (vectors[-1].square() / apart).sum()
        return _nodes(torch.cat([self.diagonal, last[None]]), self.beside)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralQuadrature:
    """What Lanczos from random probes says of the whole spectrum of F; each method gives a number with both errors.

    Attributes:
        rules: One a probe.
        num_rows: n.
        num_tokens: N.
        num_params: P, or None.
        round_off: How far a product of a vector of norm 1 is from that of exact arithmetic, as measured.
        exact_trace: tr F where it is known; else it is estimated.
        num_products: How many products were taken.
        solver: The method and its options.
    """

    rules: tuple[Rule, ...]
    num_rows: int
    num_tokens: int
    num_params: int | None
    round_off: float
    exact_trace: float | None
    num_products: int
    solver: str

    def trace(self) -> Estimate:
        """The trace of F, without an error of quadrature, as one step gives uᵀ A u."""
        if self.exact_trace is not None:
            return _known(self.exact_trace)
        return self._between([(v, v) for v in self._first()], self.num_rows * self.round_off)

    def effective_dimension(self, gamma: float) -> Estimate:
        """Σ λ/(λ + γ).

        Raises:
            ValueError: If γ is not positive.
        """
        return self._sum(lambda x: x / (x + _positive(gamma)))

    def log_det(self, gamma: float) -> Estimate:
        """Σ log(1 + λ/γ): log det(F + γI) − P log γ.

        Raises:
            ValueError: If γ is not positive.
        """
        return self._sum(lambda x: (x / _positive(gamma)).log1p())

    def entropy(self) -> Estimate:
        """−Σ p log p of the shares p = λ/Σλ, in nats."""
        bounds, first = self.bounds(torch.special.entr), self._first()
        middle = torch.tensor([(a + b) / 2 for a, b in bounds], dtype=torch.float64, device="cpu")
        along = torch.tensor(first, dtype=torch.float64, device="cpu")
        total = float(along.mean()) if self.exact_trace is None else self.exact_trace
        if not total > 0:
            return _known(0.0)
        value = math.log(total) + float(middle.mean()) / total
        each = middle / total
        if self.exact_trace is None:  # the delta method: the sum and the trace come from the same probes
            each = each + (1 / total - float(middle.mean()) / total**2) * along
        half = sum(b - a for a, b in bounds) / (2 * len(bounds)) + self.rounding(torch.special.entr)
        return _estimate(value, half / total, each)

    def effective_rank(self) -> Estimate:
        """The exponential of the spectral entropy; its errors are those of the entropy, carried over to first order."""
        found = self.entropy()
        value = math.exp(found.value) if self.trace().value > 0 else 0.0
        return Estimate(
            value=value,
            quadrature_error=value * math.expm1(found.quadrature_error),
            standard_error=value * found.standard_error,
            low=math.exp(found.low),
            high=math.exp(found.high),
        )

    def participation_ratio(self) -> Estimate:
        """(tr F)²/‖F‖_F²; without an error of quadrature, as two steps give uᵀ A² u."""
        first, second = self._first(), self._second()
        along, squared = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (first, second))
        total = float(along.mean()) if self.exact_trace is None else self.exact_trace
        norm = float(squared.mean())
        if not norm > 0:
            return _known(0.0)
        value = total**2 / norm
        each = -value * squared / norm
        if self.exact_trace is None:
            each = each + 2 * total / norm * along
        relative = 2 * self.num_rows * self.round_off / max(total, 1e-300)
        relative += 2 * (self.num_rows * norm) ** 0.5 * self.round_off / norm
        return _estimate(value, value * relative, each)

    def num_above(self, threshold: float) -> Estimate:
        """The number of eigenvalues above a threshold that is positive.

        With the round-off of the products, no eigenvalue is off by more (Weyl): the bounds are those of thresholds that
        lie that far above and below.

        Raises:
            ValueError: If the threshold is not positive.
        """
        at = _positive(threshold)
        return self._between([self._mass_above(rule, at) for rule in self.rules], 0.0)

    def density(self, edges: Float[Tensor, " k_1"]) -> list[Estimate]:
        """The numbers of eigenvalues between edges that ascend, all positive.

        Args:
            edges: The edges of the bins.
        """
        above = [[self._mass_above(rule, _positive(float(edge))) for edge in edges] for rule in self.rules]
        return [
            self._between([(max(a[i][0] - a[i + 1][1], 0.0), a[i][1] - a[i + 1][0]) for a in above], 0.0)
            for i in range(len(edges) - 1)
        ]

    def _mass_above(self, rule: Rule, threshold: float) -> tuple[float, float]:
        """Bounds of uᵀ 1[A > t] u."""
        low, high = threshold + self.round_off, threshold - self.round_off
        strictly = _weight(rule, low, lambda nodes, at: (nodes > low) & ~at)
        at_least = _weight(rule, high, lambda nodes, at: (nodes > high) | at)
        return strictly * self.num_rows, at_least * self.num_rows

    def _sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        return self._between(self.bounds(function), self.rounding(function))

    def bounds(self, function: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
        """Bound uᵀ f(A) u of each probe from below and above, up to `rounding`.

        Args:
            function: f, whose derivatives have the signs that the file's docstring names.
        """

        def by(nodes: Tensor, weights: Tensor) -> float:
            return float((function(nodes.clamp(min=0)) * weights).sum()) * self.num_rows

        pairs = [(by(*rule.radau(0.0)), by(*rule.gauss())) for rule in self.rules]
        return [(min(pair), max(pair)) for pair in pairs]

    def rounding(self, function: Callable[[Tensor], Tensor]) -> float:
        """What round-off may add: ‖f(A + E) − f(A)‖ ≤ f(‖E‖) for operator monotone f with f(0) = 0 (Ando 1988).

        −x log x is not monotone; it is taken to change by no more than it does from 0, where it is steepest.
        """
        return self.num_rows * abs(float(function(torch.tensor(self.round_off, dtype=torch.float64, device="cpu"))))

    def _first(self) -> list[float]:
        return [float(rule.diagonal[0]) * self.num_rows for rule in self.rules]

    def _second(self) -> list[float]:
        return [float(rule.diagonal[0].square() + rule.beside[0].square()) * self.num_rows for rule in self.rules]

    def _between(self, bounds: list[tuple[float, float]], rounding: float) -> Estimate:
        half = sum(high - low for low, high in bounds) / (2 * len(bounds)) + rounding
        each = torch.tensor([(low + high) / 2 for low, high in bounds], dtype=torch.float64, device="cpu")
        return _estimate(float(each.mean()), half, each)


QuadratureKernel = Callable[..., SpectralQuadrature]


def lanczos_quadrature(*, num_probes: int = 8, num_steps: int = 40, seed: int = 0) -> QuadratureKernel:
    """Return operator → `SpectralQuadrature`: sums over the whole spectrum, each with an error of both kinds.

    Cost: `num_probes` · `num_steps` products, and one to measure their round-off; memory 8 N a step. Probes of a stored
    Gram go on together, so that it is read `num_steps` + 1 times in all; their steps are held together then. The kernel
    takes an operator, and as keywords `steps`, {probe: those of an earlier call to go on from}, `keep`, called with the
    probe and each new step, and `progress`, called with the products done and their number.

    Args:
        num_probes: How many random vectors of signs; the standard error falls with the root of it.
        num_steps: Lanczos steps from each; the error of quadrature falls with it.
        seed: Of the probes.

    Raises:
        ValueError: If `num_probes` < 1 or `num_steps` < 2, or, of the kernel, a product is not finite.

    Example:
        >>> from fisherfunc.linalg.krylov.token_operator import gram_operator
        >>> found = lanczos_quadrature(num_probes=4)(gram_operator(torch.diag(torch.tensor([9.0, 6.0, 3.0]))))
        >>> round(found.effective_dimension(1.0).value, 6)  # 3/4 + 2/3 + 1/2
        1.916667
    """
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 2)):
        if value < least:
            raise ValueError(f"lanczos_quadrature expected {name} >= {least}, got {name}={value}")

    def kernel(
        operator: TokenOperator,
        *,
        steps: Mapping[int, Iterable[Step]] | None = None,
        keep: Callable[[int, Step], None] | None = None,
        progress: Progress | None = None,
    ) -> SpectralQuadrature:
        rules: list[Rule] = []
        total = num_probes * min(num_steps, operator.num_rows) + 1
        products, measured, round_off = 0, 0, 0.0
        together = 1 if operator.block_product is None else num_probes
        for first in range(0, num_probes, together):
            probes = range(first, first + together)
            spaces = {probe: _begun(operator, probe, (steps or {}).get(probe, ())) for probe in probes}
            while True:
                done = products + sum(space.num_steps for space in spaces.values())
                if progress is not None and done > products:
                    progress(done, total)
                going = {probe: space for probe, space in spaces.items() if not _at_end(space)}
                if not going:
                    break
                grow(operator, going, keep)
            products = done
            rules += map(_rule, spaces.values())
            if 0 in spaces:
                identity = torch.eye(spaces[0].num_steps, dtype=torch.float64, device="cpu")
                total_error, measured = measured_round_off(operator, spaces[0], identity)
                round_off = total_error / (1.0 if operator.num_rows <= FEW_ROWS else spaces[0].num_steps ** 0.5)
        return SpectralQuadrature(
            rules=tuple(rules),
            num_rows=operator.num_rows,
            num_tokens=operator.num_tokens,
            num_params=operator.num_params,
            round_off=round_off + operator.inexact,
            exact_trace=operator.trace,
            num_products=products + measured,
            solver=f"lanczos_quadrature(num_probes={num_probes}, num_steps={num_steps}, seed={seed})",
        )

    def _begun(operator: TokenOperator, probe: int, known: Iterable[Step]) -> Krylov:
        start = probe_vector(operator.num_rows, seed, probe).to(operator.device)
        space = Krylov(start[None], num_steps, seed)
        for step in known:
            if not space.full:
                space.add(step)
        return space

    return kernel


def _at_end(space: Krylov) -> bool:
    """Whether no more steps are made, or the probe reaches no further."""
    return space.full or (space.num_steps > 0 and float(_rule(space).beside[-1]) == 0.0)


def probe_vector(num_rows: int, seed: int, probe: int) -> Float[Tensor, " n"]:
    """Draw the random signs of a probe, on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + probe)
    return (2.0 * torch.randint(0, 2, (num_rows,), generator=generator, device="cpu") - 1).double()


def _rule(space: Krylov) -> Rule:
    matrix = space.coefficients
    inside = (matrix[:-1] + matrix[:-1].mT) / 2
    below = torch.cat([inside.diagonal(offset=1), matrix[-1, -1:]])
    return Rule(diagonal=inside.diagonal().clone(), beside=below.clone())


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def _nodes(diagonal: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
    return values, vectors[0].square()


def _weight(rule: Rule, node: float, chosen: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The weight of some nodes of the rule with one given, told from it within rounding."""
    nodes, weights = rule.radau(node)
    at = (nodes - node).abs() <= 1e-12 * nodes.abs().max()
    return float(weights[chosen(nodes, at)].sum())


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"expected a number above zero, got {value!r}; counts of zero eigenvalues are not defined")
    return value


def _known(value: float) -> Estimate:
    return Estimate(value=value, quadrature_error=0.0, standard_error=0.0, low=value, high=value)


def _estimate(value: float, half: float, each: Tensor) -> Estimate:
    count = len(each)
    if count == 1:
        return Estimate(value=value, quadrature_error=half, standard_error=math.nan, low=-math.inf, high=math.inf)
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    error = float(each.std()) / count**0.5
    spread = half + float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    found = Estimate(value=value, quadrature_error=half, standard_error=error, low=0.0, high=0.0)
    return replace(found, low=value - spread, high=value + spread)
