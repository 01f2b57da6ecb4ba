"""What a result says of how it came about: which Fisher, of which model and tokens, by which pass, how checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, Literal


class Unsaid(Enum):
    """What a result has nothing to say of, where None is an answer."""

    UNSAID = "unsaid"

    def __bool__(self) -> Literal[False]:
        """It counts as None does."""
        return False


UNSAID: Any = Unsaid.UNSAID


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was computed and how, in plain Python values; None, or `UNSAID`, where a result has nothing to say of it.

    Attributes:
        fisher: "empirical", "true (exact)" or "true (Monte-Carlo, …)".
        targets: Which targets the rows are of, options included.
        loss: Its name.
        loss_id: A hash of what the loss computes.
        shift: By how many positions targets lie ahead of predictions.
        batch: A hash of the batch, or of each.
        summed_tokens: Of unit "sequence", a hash of the tokens that are summed.
        num_summed_tokens: Of unit "sequence", how many tokens are summed.
        tokens: A hash of which tokens the rows are; of `ff.TokenGrams.fingerprint`.
        data: What was pulled of a loader or data set: its `source`, `num_batches` and `of_batches`.
        num_valid_tokens: How many tokens there were to choose from.
        dropped_tokens: How many were left out as their loss or gradient is not finite.
        seed: Of whatever is picked.
        unit: What a row is: "token" or "sequence".
        centered: Whether the mean row was subtracted.
        num_tokens: N, the number of units.
        num_rows: How many rows G has.
        num_sequences: How many sequences they are of.
        clusters: A hash of the clusters that stand for sequences; None where sequences do.
        mean_loss: In nats per token.
        num_params: P.
        accumulated: By which rule parameters were added to one Gram each.
        blocks: The rule of the blocks.
        dtype: Of the parameters.
        gram_dtype: In which Grams are accumulated.
        eigensolve_dtype: In which they are solved; None by a kernel of the user's own.
        device: Where the pass ran.
        route: "factored" or "dense".
        route_reason: Why the dense one.
        plan: Of the pass, as `ff.RunPlan.to_dict` has it.
        passes: How many passes over the tokens.
        segments: Into how many parts the model was divided.
        chunk_size: Tokens per batched backward pass.
        predicted_peak_bytes: What the pass was planned to take.
        causal_prefixes: Whether a token's sequence was cut after it.
        output_layer: The parameter whose gradient has a closed form in the logits; None where none has.
        stack_width: How many sequences ran together.
        exploited: What was exploited of the model's structure.
        given_up: {what was not: why}.
        formed_parameters: {parameter whose gradients were formed: why}.
        slabbed_parameters: Those too large for a group, which went by the dense route.
        resumed: What an earlier run had left.
        method: How gradients or eigenvalues were computed.
        self_check: What the check by ordinary backward passes found; None where there was none.
        round_off: How far the Grams are from those of exact arithmetic, or why that is not known.
        each_alone: Whether each sample alone was said to be meant.
        plan_given: Whether a plan was given.
        approximations: Whatever is not exact, in words.
        sampled_parameters: Those of which some coordinates were kept.
        exact_parameters: Of projected rows, those that were not projected.
        sketch: Rank, seed and errors of projected rows.
        parameters: A hash of the parameters.
        versions: {package: version}.
        outcome: The seconds and peak bytes of the pass.
        pass_time_s: Its seconds.
        wall_time_s: Those of the whole run.
        num_ranks: How many processes shared the work.
        ranks: What each of them had to do.
        normalization: What F is, from G.
        solver: {block: how it was solved}.
        fallback: {block: why another solver}.
        resolution: {block: below which eigenvalues are round-off}.
        population: Why nothing is said of the population.
        model: The name of its class.
        mode: In which it was evaluated.
        num_frozen_params: How many parameters are not differentiated by.
        derivative: Of an operator, by what products are taken.
        round_off_measured_by: Of an operator, against what.
        num_products: How many products were taken.
        resumed_products: How many of them an earlier run had left.
        exact: What of a result by products is exact.
        certified: What is certified, and by what.
        estimated: What is estimated, and by what.
        not_certified: What is not.
        orthonormality_before: How far eigenvectors were from orthonormal as they came.
        orthonormality: How far they are.
        model_id: What the command calls the model.
        model_source: Where it is from.
        adapter_of: The model that it is an adapter of.
        text: What the command read.
        command: The command itself.
        context: Positions of a window of the text.
        bos: Whether windows begin with the start token.
        window_start: The tokens that they begin with.
        num_windows: How many there are.
        windows_of_text: How many the text has; None of a stream, or of what is too large to be counted.
        bytes_of_text: Of a text that was read where windows lie.
        num_documents: How many documents they are of; None of a text that is one.
        step: Of training.
        more: What a user adds, under names of their own.

    Raises:
        ValueError: If `more` has a name of ours.
    """

    fisher: str | None = None
    targets: str | None = None
    loss: str | None = None
    loss_id: str | None = None
    shift: int | None = None
    batch: str | Sequence[Any] | None = None
    summed_tokens: str | None = None
    num_summed_tokens: int | None = None
    tokens: str | None = None
    data: Mapping[str, Any] | None = None
    num_valid_tokens: int | None = None
    dropped_tokens: int | None = None
    seed: int | None = None
    unit: str | None = None
    centered: bool | None = None
    num_tokens: int | None = None
    num_rows: int | None = None
    num_sequences: int | None = None
    clusters: str | Unsaid | None = UNSAID
    mean_loss: float | None = None
    num_params: int | None = None
    accumulated: str | None = None
    blocks: str | None = None
    dtype: str | None = None
    gram_dtype: str | None = None
    eigensolve_dtype: str | Unsaid | None = UNSAID
    device: str | None = None
    route: str | None = None
    route_reason: str | None = None
    plan: Mapping[str, Any] | None = None
    passes: int | None = None
    segments: int | None = None
    chunk_size: int | None = None
    predicted_peak_bytes: int | None = None
    causal_prefixes: bool | None = None
    output_layer: str | Unsaid | None = UNSAID
    stack_width: int | None = None
    exploited: Sequence[str] | None = None
    given_up: Mapping[str, str] | None = None
    formed_parameters: Mapping[str, str] | None = None
    slabbed_parameters: Sequence[str] | None = None
    resumed: str | None = None
    method: str | None = None
    self_check: Mapping[str, Any] | Unsaid | None = UNSAID
    round_off: Mapping[str, Any] | None = None
    each_alone: bool | None = None
    plan_given: bool | None = None
    approximations: Sequence[str] | None = None
    sampled_parameters: Sequence[str] | None = None
    exact_parameters: Sequence[str] | None = None
    sketch: Mapping[str, Any] | None = None
    parameters: str | None = None
    versions: Mapping[str, str] | None = None
    outcome: Mapping[str, Any] | None = None
    pass_time_s: float | None = None
    wall_time_s: float | None = None
    num_ranks: int | None = None
    ranks: Sequence[Mapping[str, Any]] | None = None
    normalization: str | None = None
    solver: Mapping[str, str] | None = None
    fallback: Mapping[str, str] | None = None
    resolution: Mapping[str, float] | None = None
    population: str | None = None
    model: str | None = None
    mode: str | None = None
    num_frozen_params: int | None = None
    derivative: str | None = None
    round_off_measured_by: str | None = None
    num_products: int | None = None
    resumed_products: int | None = None
    exact: Sequence[str] | None = None
    certified: Sequence[str] | None = None
    estimated: Sequence[str] | None = None
    not_certified: Sequence[str] | None = None
    orthonormality_before: float | None = None
    orthonormality: float | None = None
    model_id: str | None = None
    model_source: str | None = None
    adapter_of: str | None = None
    text: str | None = None
    command: str | None = None
    context: int | None = None
    bos: str | None = None
    window_start: Sequence[str] | None = None
    num_windows: int | None = None
    windows_of_text: int | Unsaid | None = UNSAID
    bytes_of_text: int | None = None
    num_documents: int | Unsaid | None = UNSAID
    step: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse two values of one name."""
        if taken := sorted(self.more.keys() & {one.name for one in fields(self)}):
            raise ValueError(f"more= expected names of your own, got {taken}, which are fields: give them as such")

    def _said(self) -> dict[str, Any]:
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "more"}
        empty = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in found.items() if value is not empty[name]}

    def to_dict(self) -> dict[str, Any]:
        """Return {name: value} of all that is said; `more` stands beside it."""
        return self._said() | dict(self.more)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Provenance":
        """Read what `to_dict` gave; names that are unknown here are `more`."""
        known = {one.name for one in fields(cls)} - {"more"}
        more = {name: value for name, value in facts.items() if name not in known}
        return cls(**{name: value for name, value in facts.items() if name in known}, more=more)

    def __or__(self, other: "Provenance") -> "Provenance":
        """Join what both say; the other counts where both do."""
        if not isinstance(other, Provenance):
            return NotImplemented
        return replace(self, **{**other._said(), "more": {**self.more, **other.more}})


class Traced:
    """A record that says how it came about.

    Attributes:
        provenance: What was computed and how.
    """

    provenance: Provenance

    @property
    def metadata(self) -> dict[str, Any]:
        """The provenance as plain Python values by name."""
        return self.provenance.to_dict()
