"""Which sequences run beside which before any gradient."""

import pytest
import torch
from torch import nn

import fisherfunc as ff


class DecidesByTheBatch(nn.Module):
    """Other predictions where the sum over the batch is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1.0 if x.sum() > 0 else 2.0)


@pytest.mark.parametrize("positive", [True, False])
def test_a_sample_without_a_token_is_seen_to_change_its_batch(positive):
    first = torch.tensor([0.1, -1.0 if not positive else 1.0])  # of the second no token counts
    others = torch.ones(2)
    batches = [(first[:, None, None].expand(2, 1, 3), torch.tensor([[1], [-100]]))]
    batches += [(others[:, None, None].expand(2, 1, 3), torch.tensor([[0], [3]]))]
    fn = ff.functionalize(DecidesByTheBatch())
    loss = ff.losses.classification()
    if positive:
        assert ff.token_grams(fn, fn.params, batches, loss).tokens.sequence.tolist() == [0, 2, 3]
        return
    with pytest.raises(ValueError, match=r"of sequences 0 to 3, at sequence 0.* depend on each other"):
        ff.token_grams(fn, fn.params, batches, loss)
