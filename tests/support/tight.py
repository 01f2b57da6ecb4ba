"""Memory that has no room for all factors at once, whatever the machine has."""

from fisherfunc.gradients.capture.segments import WHOLE
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored import route as factored
from fisherfunc.gradients.factored.groups import grouped


def tighten(monkeypatch, *, share):
    """Let a pass hold one part in `share` of what all parameters take; at least the largest."""

    def tight(held, order, budget, segments=WHOLE, **_):
        sizes = [held[name] for name in order]
        return grouped(held, order, int(max(sum(sizes) / share, 1.1 * max(sizes, default=0))), segments)

    monkeypatch.setattr(divide, "grouped", tight)


def unchecked(monkeypatch):
    """Many groups of factors, samples one by one (stacks have passes of their own), no check of a few tokens."""
    tighten(monkeypatch, share=5)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setattr(factored, "tried", lambda *_, **__: None)
    monkeypatch.setattr(divide, "stack_width", lambda *_: 1)
