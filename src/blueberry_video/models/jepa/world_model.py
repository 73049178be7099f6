"""V-JEPA 2-AC: what a frozen encoder will see next, given an action (arXiv 2506.09985;
github.com/facebookresearch/vjepa2).

Unusual about it: the encoder sees every frame alone, as a still picture repeated over its tubelet, and is never
trained; all that is learned is a predictor in the space of its tokens. A step of the predictor's sequence is an action
token, a state token and the patches of one frame, and attention is block-causal: every token sees all tokens of its
own step and of the steps before. The outputs at the patches of a step are the patches of the next frame. There are no
position embeddings: patches turn by time, row and column, the action and the state by time alone.

Letters: B batch, T frames, S patches a frame, D the encoder's width, A and K the widths of actions and states.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.blocks import init_trunc_normal
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.rope import Rotation, channels_per_axis, grid_positions, rotate, rotation
from blueberry_video.weights import files as weight_files
from blueberry_video.weights.load import load_strictly

CONDITIONS = 2  # tokens of a step that are no patches: the action, then the state

Past = tuple[Tensor, Tensor]  # a layer's rotated keys and values of the steps so far, (B, heads, N, head_dim)


class WorldModel(nn.Module):
    """Predicts the encoder's tokens of the next frames from those of the first, the actions and the states.

    Latents are the encoder's tokens after a LayerNorm without parameters, (B, T, S, D); so are predictions.

    Args:
        encoder: takes single frames (``images=True``); it stays frozen and in evaluation mode.
        action_dim: A, the width of an action; of discrete actions their number, each then a one-hot vector.
        state_dim: K, the width of a state.
        predictor_dim, predictor_depth, predictor_num_heads: of the predictor.
        mlp_ratio: hidden over outer width of its MLPs.
        rope_quirk: rotate as the published weights do, see :mod:`blueberry_video.nn.rope`.
        starts_as_copy: the untrained predictor gives every frame back as it is, so that training goes on from the
            trivial prediction in place of finding it first. The published one starts from small random numbers.

    Raises:
        ValueError: if the encoder takes no single frames, for widths below 1, heads too narrow to rotate, or a
            predictor too narrow to start as a copy; in use, for latents, actions or states of other shapes.
    """

    def __init__(
        self,
        encoder: Encoder,
        action_dim: int = 7,
        state_dim: int = 7,
        predictor_dim: int = 1024,
        predictor_depth: int = 24,
        predictor_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        rope_quirk: bool = False,
        starts_as_copy: bool = False,
    ):
        super().__init__()
        if not encoder.images:
            raise ValueError(
                "model.encoder.images=false: a world model shows its encoder every frame alone. Write "
                "`model.encoder.images=true`; it changes no weights."
            )
        for key, width in (("action_dim", action_dim), ("state_dim", state_dim)):
            if width < 1:
                raise ValueError(f"model.{key}={width} must be at least 1, the number of values of one.")
        self.encoder = encoder.requires_grad_(False)
        self.action_dim, self.state_dim = action_dim, state_dim
        _, height, width = encoder.grid(encoder.video_size)
        self.predictor = Predictor(
            (height, width),
            encoder.embed_dim,
            action_dim,
            state_dim,
            predictor_dim,
            predictor_depth,
            predictor_num_heads,
            mlp_ratio,
            rope_quirk,
        )
        if starts_as_copy:
            self.predictor.start_as_copy()

    def train(self, mode: bool = True) -> "WorldModel":
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode_frames(self, video: Tensor) -> Tensor:
        """Latents of every frame by itself: (B, C, T, H, W), normalised as the encoder wants it -> (B, T, S, D)."""
        tokens = self.encoder(rearrange(video, "b c t h w -> (b t) c 1 h w"))
        return F.layer_norm(tokens, tokens.shape[-1:]).unflatten(0, (len(video), -1))

    def forward(self, latents: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predicts every frame from the true ones before it (teacher forcing).

        Args:
            latents: (B, T, S, D) of all frames; the last is not looked at.
            actions: (B, T-1, A), action t leading from frame t to t + 1.
            states: (B, T, K) or (B, T-1, K); the last of T is not looked at.

        Returns:
            (B, T-1, S, D): of frames 1 to T - 1.
        """
        steps = latents.shape[1] - 1
        if states.shape[1] == steps + 1:
            states = states[:, :-1]
        self._check(latents, actions, states, steps)
        return self.predictor(latents[:, :-1], actions, states)[0]

    def rollout(self, latents: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predicts frames one after the other, each from the first frame and the predictions so far.

        A token sees nothing later, so what was computed for a step stays right: its keys and values are kept, and
        every step only computes its own tokens.

        Args:
            latents: (B, 1, S, D) of the first frame.
            actions: (B, T', A), T' of at least 1.
            states: (B, T', K) in which the actions are taken; more are not looked at.

        Returns:
            (B, T', S, D): of the T' frames after the first.
        """
        steps = actions.shape[1]
        states = states[:, :steps]
        self._check(latents, actions, states, steps, frames=1)
        frame, past = latents, None
        predictions = []
        for t in range(steps):
            frame, past = self.predictor(frame, actions[:, t : t + 1], states[:, t : t + 1], past)
            predictions.append(frame)
        return torch.cat(predictions, dim=1)

    def _check(self, latents: Tensor, actions: Tensor, states: Tensor, steps: int, frames: int | None = None) -> None:
        if steps < 1:
            raise ValueError("there is nothing to predict: give at least two frames, or one frame and one action.")
        frames = steps + 1 if frames is None else frames
        patches = (math.prod(self.predictor.grid), self.encoder.embed_dim)
        wanted = {
            "latents": (latents, (frames, *patches), "as encode_frames gives them"),
            "actions": (actions, (steps, self.action_dim), f"model.action_dim={self.action_dim}"),
            "states": (states, (steps, self.state_dim), f"model.state_dim={self.state_dim}"),
        }
        for name, (value, shape, origin) in wanted.items():
            if tuple(value.shape) != (len(latents), *shape):
                raise ValueError(
                    f"{name} have the shape {tuple(value.shape)} but must have {(len(latents), *shape)}: batch, steps "
                    f"and what follows ({origin}). Bring the data and the model together."
                )


class Predictor(nn.Module):
    """The block-causal transformer of a :class:`WorldModel`.

    Args:
        grid: patches of a frame along (h, w).
        embed_dim: D, the encoder's width.
        action_dim, state_dim: A and K.
        dim, depth, num_heads, mlp_ratio, rope_quirk: see :class:`WorldModel`.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int,
        action_dim: int,
        state_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        rope_quirk: bool = False,
    ):
        super().__init__()
        self.grid, self.head_dim, self.rope_quirk = grid, dim // num_heads, rope_quirk
        self.embed = nn.Linear(embed_dim, dim)
        self.action_encoder = nn.Linear(action_dim, dim)
        self.state_encoder = nn.Linear(state_dim, dim)
        self.blocks = nn.ModuleList(CausalBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, embed_dim)
        init_trunc_normal(self)

    def forward(
        self, latents: Tensor, actions: Tensor, states: Tensor, past: list[Past] | None = None
    ) -> tuple[Tensor, list[Past]]:
        """The frames after ``latents``, and what the next steps need of these.

        Args:
            latents: (B, T, S, D) of T frames that follow one another.
            actions, states: (B, T, A) and (B, T, K) at these frames.
            past: of all steps before the first of these, as returned; ``None`` at the start.

        Returns:
            (B, T, S, D), normalised as latents are, and keys and values of every layer so far.
        """
        conditions = torch.stack([self.action_encoder(actions), self.state_encoder(states)], dim=2)  # (B, T, 2, dim)
        x = torch.cat([conditions, self.embed(latents)], dim=2)
        steps, tokens = x.shape[1:3]
        first = past[0][0].shape[2] // tokens if past else 0
        turn = self._rotation(first, steps, x)
        mask = block_causal_mask(first, steps, tokens, x.device) if steps > 1 else None
        x = x.flatten(1, 2)
        kept = []
        for number, block in enumerate(self.blocks):
            x, keys_values = block(x, turn, mask, past[number] if past else None)
            kept.append(keys_values)
        x = self.proj(self.norm(x.unflatten(1, (steps, tokens))[:, :, CONDITIONS:]))
        return F.layer_norm(x, x.shape[-1:]), kept

    @torch.no_grad()
    def start_as_copy(self) -> None:
        """Sets the weights so that the output is the input: blocks add nothing, and ``proj`` undoes ``embed``.

        Raises:
            ValueError: if ``dim`` is not above ``embed_dim``.
        """
        dim, embed_dim = self.embed.weight.shape
        if dim <= embed_dim:
            raise ValueError(
                f"model.starts_as_copy=true needs model.predictor_dim={dim} above the encoder's width of {embed_dim}: "
                "what is narrower cannot hold a copy. Widen it, or set model.starts_as_copy=false."
            )
        columns = torch.randn_like(self.embed.weight)
        columns -= columns.mean(dim=0)  # the norm before proj takes means away
        rotation, _ = torch.linalg.qr(columns)
        self.embed.weight.copy_(rotation)
        self.proj.weight.copy_(rotation.T)
        for block in cast(Iterable[CausalBlock], self.blocks):
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)

    def _rotation(self, first: int, steps: int, like: Tensor) -> Rotation:
        """Of the tokens of ``steps`` steps from number ``first`` on; (steps * tokens, head_dim)."""
        patches = grid_positions((1, *self.grid))
        places = torch.cat([patches.new_zeros(CONDITIONS, 3), patches]).repeat(steps, 1, 1)  # (steps, tokens, 3)
        places[..., 0] = torch.arange(first, first + steps)[:, None]
        cos, sin = rotation(places.flatten(0, 1), self.head_dim, self.rope_quirk)
        dtype = torch.promote_types(like.dtype, torch.float32)  # half precision would round the places
        return Rotation(cos.to(like.device, dtype), sin.to(like.device, dtype))


def convert_original(content: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights in a file of the vjepa2 repository under the names of a :class:`WorldModel`.

    Left out is the encoder of the camera's pose, which the published model has and does not use.

    Args:
        content: all that the file holds: state dicts by name, of which ``encoder`` and ``predictor`` are read.

    Raises:
        ValueError: if one of them is missing, or the predictor takes no actions.
    """
    missing = [name for name in ("encoder", "predictor") if not isinstance(content.get(name), dict)]
    if missing:
        raise ValueError(
            f"the file holds no {missing[0]!r}: V-JEPA 2-AC's has the state dicts 'encoder' and 'predictor'."
        )
    encoder, predictor = (weight_files.without_prefixes(content[name]) for name in ("encoder", "predictor"))
    if "action_encoder.weight" not in predictor:
        raise ValueError(
            "the file's predictor has no action_encoder, so it is not that of an action-conditioned model: read V-JEPA "
            "and V-JEPA 2 with blueberry_video.models.jepa.model.from_published."
        )
    converted = {f"encoder.{name}": value for name, value in encoder.items() if name != "pos_embed"}
    for name, value in predictor.items():
        if not name.startswith("extrinsics_encoder."):
            converted[f"predictor.{name.removeprefix('predictor_')}"] = value
    return converted


def from_published(
    path: str | Path,
    num_frames: int = 16,
    image_size: int = 256,
    num_heads: int | None = None,
    predictor_num_heads: int = 16,
) -> WorldModel:
    """The V-JEPA 2-AC in a file of its repository, encoder and all. Prints what it took.

    Args:
        path: a torch file with ``encoder`` and ``predictor``.
        num_frames, image_size: of the clips; no weight tells them.
        num_heads, predictor_num_heads: no weight tells them either; by default what the published model has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or another model's.
    """
    content = weight_files.read_content(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dicts: give a file of V-JEPA 2-AC.")
    state = convert_original(content)
    weights = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    heads = num_heads or len(weights["patch_embed.proj.bias"]) // 64
    encoder = vit.VisionTransformer.from_weights(
        weights, path, num_frames, image_size, heads, images=True, positions="rope_3d", rope_quirk=True
    )
    dim, action_dim = state["predictor.action_encoder.weight"].shape
    model = WorldModel(
        encoder,
        action_dim,
        state["predictor.state_encoder.weight"].shape[1],
        dim,
        weight_files.num_blocks(state, "predictor.blocks"),
        predictor_num_heads,
        state["predictor.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        rope_quirk=True,
    )
    load_strictly(model, state, path)
    print(f"V-JEPA 2-AC weights from {path}: the file's 'encoder' and 'predictor', for frames of {image_size} pixels")
    return model


def block_causal_mask(first: int, steps: int, tokens: int, device: torch.device) -> Tensor:
    """Which keys a query sees: bool (steps * tokens, (first + steps) * tokens), true for those of its step or earlier.

    Args:
        first: steps before the first query's.
        steps: steps of the queries.
        tokens: of a step.
        device: of the mask.
    """
    step = torch.arange(first + steps, device=device).repeat_interleave(tokens)
    return step[first * tokens :, None] >= step


class CausalAttention(nn.Module):
    """Multi-head attention of some steps to themselves and to those before.

    Args:
        dim: width of the tokens.
        num_heads: must divide it.

    Raises:
        ValueError: if it does not, or heads are too narrow to rotate.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"model.predictor_num_heads={num_heads} does not divide model.predictor_dim={dim}: choose a divisor."
            )
        self.num_heads = num_heads
        channels_per_axis(dim // num_heads)  # too narrow heads are refused here, not at the first step
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """(B, N, dim) -> (B, N, dim), and the keys and values of these tokens and all before them.

        Args:
            x: the tokens.
            turn: their rotation.
            mask: (N, N_past + N) bool: which keys each sees; all if ``None``.
            past: keys and values of the N_past tokens before.
        """
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, h=self.num_heads)
        q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, head_dim)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), (k, v)


class CausalBlock(nn.Module):
    """Pre-norm transformer block over :class:`CausalAttention`, whose arguments and results it shares."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CausalAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        attended, kept = self.attn(self.norm1(x), turn, mask, past)
        x = x + attended
        return x + self.mlp(self.norm2(x)), kept
