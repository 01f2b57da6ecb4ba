"""Language models without attention, to be made odd; and a batch of sequences of two kinds."""

import torch
from torch import nn
from zoo import VOCAB

WIDTH = 6


class Bigram(nn.Module):
    """Each position sees its own token only; the head can be made to leak, to be bypassed or to be no linear map."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.variant = variant
        self.embedding = nn.Embedding(VOCAB, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.tanh(self.middle(self.embedding(input_ids)))
        logits = self.head(x)
        if self.variant == "leaks":
            return logits + 0.1 * logits.roll(1, dims=1)
        if self.variant == "bypassed":
            return logits + x.sum(dim=-1, keepdim=True) * torch.linspace(0, 1, VOCAB, dtype=x.dtype, device=x.device)
        if self.variant == "capped":
            return 30 * torch.tanh(logits / 30)
        if self.variant == "overwritten":
            return self.head(self.middle(self.embedding(input_ids)).relu_())
        if self.variant == "looks ahead":
            return self.head(x + x.flip(1))
        return logits


class Unbatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return torch.from_numpy(cotangent.cpu().numpy().copy()).to(cotangent.device)


class SometimesUnbatched(Bigram):
    """Short sequences use a function whose backward pass cannot be batched."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.tanh(self.middle(self.embedding(input_ids)))
        return self.head(Unbatched.apply(x) if input_ids.shape[1] <= 3 else x)


class Tokens(nn.Module):
    """A language model without attention; a subclass says what comes between the embedding and the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.mixing = nn.Linear(6, 6)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.other_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.embedding(input_ids), input_ids))

    def between(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.middle(x))


def token_batch() -> dict[str, torch.Tensor]:
    """Two even sequences, the second with two tokens that count, and an odd one between them."""
    ids = torch.randint(VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = torch.tensor([2, 3, 4])
    labels = ids.clone()
    labels[2, 3:] = -100
    return {"input_ids": ids, "labels": labels}
