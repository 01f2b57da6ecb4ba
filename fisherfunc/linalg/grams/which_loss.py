"""Whether results are of one loss, by what they say of it: its name, its shift, and what it computes."""

from collections.abc import Iterable, Mapping

from fisherfunc.records.provenance import Provenance

UNIDENTIFIED = "not identified"
"""What the identity begins with of a loss that cannot be told from others."""


def same_loss(results: Iterable[Provenance]) -> bool:
    """Whether the losses are known to be one. Where an older version has not said what one computes, its name counts.

    Args:
        results: What each says of how it came about.
    """
    facts = list(results)
    names = {(f.loss, f.shift or 0) for f in facts}
    ids = {f.loss_id for f in facts if f.loss_id is not None}
    return len(names) == 1 and (len(ids) <= 1) and not any(one.startswith(UNIDENTIFIED) for one in ids)


def described_losses(results: Mapping[str, Provenance]) -> dict[str, str | None]:
    """The losses in words, with what tells those of one name apart; None where one is not known.

    Args:
        results: {name: what each says of how it came about}.

    Example:
        >>> described_losses({"a": Provenance(loss="causal_lm", shift=1), "b": Provenance(loss="masked_lm")})
        {'a': 'causal_lm, shift 1', 'b': 'masked_lm, shift 0'}
        >>> described_losses({name: Provenance(loss="mine", loss_id=code) for name, code in (("a", "12"), ("b", "34"))})
        {'a': 'mine, shift 0, code 12', 'b': 'mine, shift 0, code 34'}
    """
    named = {name: None if f.loss is None else f"{f.loss}, shift {f.shift or 0}" for name, f in results.items()}
    if len(set(named.values())) > 1:
        return named
    return {
        name: f"{text}, code {results[name].loss_id}" if text and results[name].loss_id else text
        for name, text in named.items()
    }
