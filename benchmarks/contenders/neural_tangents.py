"""neural-tangents: the empirical tangent kernel in JAX of the losses (or logits), compiled before it is timed.

The torch model is written again in JAX, layer by layer, with the same parameters; the fastest implementation of
`empirical_ntk_fn` on this very task is the one timed.
"""

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.contenders.common import FULL, Answer, CannotError, Options, Work
from benchmarks.tasks import Task

FITS = "neural-tangents 0.6.5 fits jax 0.4.23, tf2jax 0.3.6 and numpy below 2"
JACOBIAN_BYTES = 10**9


def prepare(task: Task, options: Options) -> Work:
    """The full Gram of a task."""
    if task.kind == "causal_lm":
        raise CannotError("takes functions in JAX; this model is a PyTorch module")
    if torch.get_num_threads() == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it imports TensorFlow
    try:
        import jax
        import neural_tangents as nt
        from jax import numpy as jnp
    except ImportError as error:
        raise CannotError(f"not importable: {error}; {FITS}") from error

    params, apply = _translated(task.model, jax)
    x, y = jnp.asarray(task.inputs.numpy()), jnp.asarray(task.targets.numpy())

    def values(p: Any, batch: Any) -> Any:
        logits = apply(p, batch[0])
        if task.kind == "classes":
            return logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1)[:, 0]

    kernels = [
        jax.jit(nt.empirical_ntk_fn(values, trace_axes=(), vmap_axes=((0, 0), 0, {}), implementation=way))
        for way in _implementations(task, nt.NtkImplementation)
    ]
    fastest: list[Callable[..., Any]] = []

    def warm() -> None:
        try:
            seconds = [_seconds(lambda kernel=kernel: kernel((x, y), None, params)) for kernel in kernels]
        except AttributeError as error:
            raise CannotError(f"with JAX {jax.__version__}: {error}; {FITS}") from error
        fastest[:] = [kernels[int(np.argmin(seconds))]]

    def answer(kernel: Any) -> Answer:
        gram = torch.from_numpy(np.array(kernel)).double()
        if task.kind == "classes":
            gram = gram.permute(0, 2, 1, 3).reshape(task.num_rows, task.num_rows)
        return Answer(grams={FULL: gram})

    return Work(
        run=lambda: fastest[0]((x, y), None, params).block_until_ready(),
        answer=answer,
        gives="Gram of the full matrix",
        warm=warm,
    )


def _implementations(task: Task, known: Any) -> list[Any]:
    """Those that fit into memory: contracted Jacobians where these do, structured derivatives without convolutions."""
    convolutions = any(isinstance(module, nn.Conv2d) for module in task.model.modules())
    fits = convolutions or 4 * task.num_rows * task.num_params <= JACOBIAN_BYTES
    return [known.JACOBIAN_CONTRACTION] * fits + [known.STRUCTURED_DERIVATIVES] * (not convolutions)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a second call, once the first has compiled."""
    call().block_until_ready()
    begin = perf_counter()
    call().block_until_ready()
    return perf_counter() - begin


def _translated(model: nn.Module, jax: Any) -> tuple[list[Any], Callable[[Any, Any], Any]]:
    """Parameters and a pure function of an `nn.Sequential`."""
    layers = list(model.children())
    arrays = [[jax.numpy.asarray(_stored(layer, p)) for p in layer.parameters()] for layer in layers]

    def apply(params: list[Any], x: Any) -> Any:
        for layer, own in zip(layers, params, strict=True):
            x = _layer(layer, own, x, jax)
        return x

    return arrays, apply


def _stored(layer: nn.Module, parameter: torch.Tensor) -> np.ndarray:
    """Weights of linear layers as (d_in, d_out): structured derivatives know x W, not x Wᵀ."""
    array = parameter.detach().numpy()
    return array.T if isinstance(layer, nn.Linear) and array.ndim == 2 else array


def _layer(layer: nn.Module, own: list[Any], x: Any, jax: Any) -> Any:
    match layer:
        case nn.Linear():
            return x @ own[0] + own[1]
        case nn.Tanh():
            return jax.numpy.tanh(x)
        case nn.ReLU():
            return jax.nn.relu(x)
        case nn.Flatten():
            return x.reshape(x.shape[0], -1)
        case nn.Conv2d():
            convolved = jax.lax.conv_general_dilated(
                x, own[0], layer.stride, "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            return convolved + own[1][:, None, None]
        case nn.MaxPool2d():
            window = (1, 1, layer.kernel_size, layer.kernel_size)
            return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, window, "VALID")
    raise CannotError(f"no translation to JAX of {type(layer).__name__} here")
