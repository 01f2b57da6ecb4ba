"""Tiny plain PyTorch modules for the zoo: recurrent, convolutional, attention, and one that reuses its parameters."""

import torch
from torch import nn

VOCAB = 37


class TinyLSTM(nn.Module):
    """A language model on `nn.LSTM`, called with a mapping; its output is a plain tensor of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(input_ids))[0])


class TinyAttention(nn.Module):
    """`nn.MultiheadAttention` with its packed `in_proj_weight`, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(dim=1))


class TinyResNet(nn.Module):
    """Convolution, batch norm (its running statistics, in evaluation mode), a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + torch.relu(self.norm(self.conv(x)))).mean(dim=(2, 3)))


class Shared(nn.Module):
    """A module called twice, a weight shared by two modules, and one read directly by its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.twice.weight
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(torch.tanh(self.tied(x)) * self.scale + x @ self.head.weight.T @ self.head.weight)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.PReLU(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, padding_mode="circular"),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3))
