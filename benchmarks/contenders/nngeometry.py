"""nngeometry: the tangent kernel of the losses (or logits) as a dense matrix, `GramMatrix`.

One call gives the Gram of the full matrix; that of one layer takes a call of its own. So this is less than what the
other contenders give, at the least price.
"""

from torch import Tensor
from torch.nn import functional

from benchmarks.contenders.common import FULL, Answer, Options, Work
from benchmarks.tasks import Task


def prepare(task: Task, options: Options) -> Work:
    """The full Gram of a task; for a layer that it does not know, nngeometry raises and says which."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection

    layers = LayerCollection.from_model(task.model)

    def values(*batch: Tensor) -> Tensor:
        logits = task.model(batch[0])
        if task.kind == "classes":
            return logits
        return functional.cross_entropy(logits, batch[1], reduction="none")[:, None]

    def run() -> Tensor:
        examples = (task.inputs.clone(), task.targets)  # it sets requires_grad on the inputs
        kernel = GramMatrix(task.model, examples, function=values, layer_collection=layers).to_torch()
        return kernel.permute(1, 0, 3, 2).reshape(task.num_rows, task.num_rows)

    return Work(run=run, answer=lambda gram: Answer(grams={FULL: gram.double()}), gives="Gram of the full matrix")
