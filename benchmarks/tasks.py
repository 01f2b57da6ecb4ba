"""What is measured on: models and data, built the same in every process from a seed.

Rows are numbered as fisherfunc numbers them: a causal model's tokens by sequence, then position; a classified sample is
a row; of "classes", row n · num_classes + c is the gradient of logit c of sample n.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fisherfunc as ff

Described = tuple[str, dict[str, Any], str]
"""What a fresh process is told of a task: its name, its sizes, the device."""
WARM_POSITIONS = 8
WARM_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and a batch.

    Attributes:
        kind: "causal_lm" (a row a predicted token), "classification" (a row a sample) or "classes" (a row a logit).
        model: In evaluation mode, float32.
        inputs: Ids `(b, s)`, or samples `(n, …)`.
        targets: The next ids `(b, s - 1)`, or classes `(n,)`.
    """

    kind: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> Any:
        """What fisherfunc takes."""
        return {"input_ids": self.inputs} if self.kind == "causal_lm" else (self.inputs, self.targets)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def rows_a_sequence(self) -> int:
        """How many consecutive rows share a forward pass."""
        return {"causal_lm": self.inputs.shape[1] - 1, "classification": 1}.get(self.kind, self.num_classes)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.inputs) * self.rows_a_sequence

    @property
    def num_params(self) -> int:
        """P, tied parameters counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_classes(self) -> int:
        """Logits of a sample; meaningless for a language model."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        return layers[-1].out_features

    @property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Layer → names of its parameters."""
        return ff.partition([name for name, _ in self.model.named_parameters()], ff.by_layer)

    def small(self) -> "Task":
        """The same on a few rows, to warm up with."""
        if self.kind == "causal_lm":
            return replace(
                self, inputs=self.inputs[:1, :WARM_POSITIONS], targets=self.targets[:1, : WARM_POSITIONS - 1]
            )
        return replace(self, inputs=self.inputs[:WARM_SAMPLES], targets=self.targets[:WARM_SAMPLES])


def gpt2(*, sequences: int, positions: int, **sizes: int) -> Task:
    """A GPT-2 at initialisation, on random ids. Without sizes it is the one of 124M parameters.

    Args:
        sequences: How many.
        positions: Ids in each; the last predicts nothing.
        sizes: Of `GPT2Config`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(config.vocab_size, (sequences, positions), generator=torch.Generator().manual_seed(1))
    return Task(kind="causal_lm", model=model, inputs=ids, targets=ids[:, 1:])


def mlp(*, samples: int, width: int, classes: bool = False) -> Task:
    """64-width-width-10 with tanh, at initialisation, on scikit-learn's digits.

    Args:
        samples: The first so many.
        width: Of both hidden layers.
        classes: Whether rows are those of all ten logits of each sample, not of the loss.
    """
    torch.manual_seed(0)
    hidden = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    model = nn.Sequential(*hidden, nn.Linear(width, 10)).eval()
    images, targets = _digits(samples)
    kind = "classes" if classes else "classification"
    return Task(kind=kind, model=model, inputs=images.flatten(1), targets=targets)


def cnn(*, samples: int, channels: Sequence[int]) -> Task:
    """Two 3 × 3 convolutions with ReLU, max-pooling and a linear layer, at initialisation, on the digits.

    Args:
        samples: The first so many.
        channels: Of the convolutions.
    """
    torch.manual_seed(0)
    first, second = channels
    model = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 16, 10),
    ).eval()
    images, targets = _digits(samples)
    return Task(kind="classification", model=model, inputs=images[:, None], targets=targets)


BUILDERS: dict[str, Callable[..., Task]] = {"gpt2": gpt2, "mlp": mlp, "cnn": cnn}


def build(name: str, sizes: Mapping[str, Any], device: str = "cpu") -> Task:
    """A task as it was described."""
    return on_device(BUILDERS[name](**sizes), device)


def on_device(task: Task, device: str) -> Task:
    """The task with model and data there."""
    inputs, targets = task.inputs.to(device), task.targets.to(device)
    return replace(task, model=task.model.to(device), inputs=inputs, targets=targets)


def _digits(samples: int) -> tuple[Tensor, Tensor]:
    """Images `(n, 8, 8)` in [0, 1], and classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32) / 16
    return images[:samples], torch.as_tensor(digits.target)[:samples].long()
