"""curvlinops: the empirical Fisher of each layer as a linear operator, its leading eigenvalues by SciPy's `eigsh`."""

import torch
from torch import Tensor, nn

from benchmarks.contenders.common import Answer, CannotError, Options, Work
from benchmarks.tasks import Task

NUM_EIGENVALUES = 10
TOLERANCE = 1e-4  # relative, of an eigenvalue; ARPACK's default would iterate to machine precision


class Shifted(nn.Module):
    """Ids to logits `(b, v, s - 1)` of the next token, as `nn.CrossEntropyLoss` wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The logits, classes second."""
        return self.model(ids, use_cache=False).logits[:, :-1].mT


def prepare(task: Task, options: Options) -> Work:
    """One operator and one Lanczos run a layer."""
    if task.kind != "causal_lm" or not options.spectra:
        raise CannotError("products with vectors: leading eigenvalues, no Gram")
    import curvlinops
    from scipy.sparse.linalg import eigsh

    task.model.set_attn_implementation("eager")  # needs forward-mode derivatives, which fused attention lacks
    model, loss = Shifted(task.model), nn.CrossEntropyLoss(reduction="mean")
    named = dict(task.model.named_parameters())
    data = [(task.inputs, task.targets)]

    def run() -> dict[str, Tensor]:
        found = {}
        for label, names in task.blocks.items():
            parameters = [named[name] for name in names]
            fisher = curvlinops.EFLinearOperator(model, loss, parameters, data, check_deterministic=False)
            count = min(NUM_EIGENVALUES, task.num_rows - 1)
            options = {"k": count, "which": "LA", "tol": TOLERANCE, "return_eigenvectors": False}
            values = eigsh(fisher.to_scipy(), **options)
            found[label] = torch.as_tensor(values.copy()).double().sort(descending=True).values
        return found

    return Work(
        run=run, answer=lambda spectra: Answer(spectra=spectra), gives=f"{NUM_EIGENVALUES} leading eigenvalues by layer"
    )
