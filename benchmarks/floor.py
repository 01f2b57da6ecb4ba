"""The floor: the operations that the factored pass cannot do without, and the time that they take at a GEMM rate.

Backward pass: 2 · P · Σ(positions touched), P the weights of linear maps except the output layer's, whose Gram is in
closed form. Contraction, half for symmetry (and half for causality) taken: N² · S · Σ d_out in causal sequences of S
positions; elsewhere, for a weight of p entries at T positions, the cheaper of N² · T² · (d_out + d_in) and of formed
gradients, 2 N T p + N² p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear map y = x W: `positions` are those at which it acts in one sequence or sample."""

    name: str
    d_in: int
    d_out: int
    positions: int

    @property
    def size(self) -> int:
        """p, without the bias."""
        return self.d_in * self.d_out


def layers_of(task: Task) -> list[Layer]:
    """The linear maps of a model, from one forward pass of a small batch; convolutions are maps of their patches."""
    found: dict[str, Layer] = {}
    handles = []
    one = task.inputs[:1]

    def record(name: str, d_in: int, d_out: int, channels: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            positions = output[0].numel() // output.shape[channels]
            found[name] = Layer(name=name, d_in=d_in, d_out=d_out, positions=positions)

        return hook

    for name, module in task.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(record(name, weight.shape[1], weight.shape[0], -1)))
        elif isinstance(module, nn.Conv2d):
            sizes = (weight[0].numel(), weight.shape[0])
            handles.append(module.register_forward_hook(record(name, *sizes, 1)))
        elif type(module).__name__ == "Conv1D":  # Transformers', stored (d_in, d_out)
            handles.append(module.register_forward_hook(record(name, weight.shape[0], weight.shape[1], -1)))
    try:
        with torch.no_grad():
            task.model(input_ids=one, use_cache=False) if task.kind == "causal_lm" else task.model(one)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def floor_operations(task: Task) -> dict[str, int]:
    """`{"backward", "contraction", "total"}` of a task."""
    parts = floor_parts(task)
    return _total(backward=parts["backward"], contraction=parts["forming"] + parts["contraction"])


def floor_parts(task: Task) -> dict[str, int]:
    """`{"backward", "forming", "contraction"}` of a task, gradients formed where that is cheaper."""
    layers = layers_of(task)
    if task.kind == "causal_lm":
        found = causal_operations(layers, sequences=len(task.inputs), span=task.rows_a_sequence)
        return {"backward": found["backward"], "forming": 0, "contraction": found["contraction"]}
    contractions = [_contraction(layer, task.num_rows) for layer in layers]
    return {
        "backward": 2 * task.num_rows * sum(layer.size * layer.positions for layer in layers[:-1]),
        "forming": sum(forming for forming, _ in contractions),
        "contraction": sum(products for _, products in contractions),
    }


def causal_operations(layers: Sequence[Layer], *, sequences: int, span: int) -> dict[str, int]:
    """As `floor_operations`, of a causal model's layers, the output layer last.

    Args:
        layers: The linear maps.
        sequences: How many.
        span: Tokens in each; that at position s touches s + 1 positions.
    """
    below, touched = layers[:-1], sequences * span * (span + 1) // 2
    return _total(
        backward=2 * sum(layer.size for layer in below) * touched,
        contraction=(sequences * span) ** 2 * span * sum(layer.d_out for layer in below),
    )


def _contraction(layer: Layer, num_rows: int) -> tuple[int, int]:
    """What forms the gradients of a layer, if that is cheaper, and what multiplies."""
    pairwise = (0, num_rows**2 * layer.positions**2 * (layer.d_in + layer.d_out))
    formed = (2 * num_rows * layer.positions * layer.size, num_rows**2 * layer.size)
    return min(pairwise, formed, key=sum)


def _total(*, backward: int, contraction: int) -> dict[str, int]:
    return {"backward": backward, "contraction": contraction, "total": backward + contraction}
