"""Feed-forward layers of transformer blocks."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, Linear: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class FeedForward(nn.Module):
    """Linear, activation, Linear, with the parameter names of diffusers: (..., D) -> (..., D).

    ``activation`` is ``"gelu"``, in the tanh approximation, or ``"silu"``.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str = "gelu"):
        super().__init__()
        act = nn.GELU(approximate="tanh") if activation == "gelu" else nn.SiLU()
        self.net = nn.Sequential(nn.Sequential(), act, nn.Linear(hidden_dim, dim))
        self.net[0].add_module("proj", nn.Linear(dim, hidden_dim))  # named as in the published files

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
