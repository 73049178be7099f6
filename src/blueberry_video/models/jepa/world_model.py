"""V-JEPA 2-AC: action-conditioned prediction of the features of a frozen encoder (arXiv 2506.09985;
github.com/facebookresearch/vjepa2).

Unusual about it: the frozen encoder receives each frame separately, as an image repeated over a tubelet; only a
predictor of its tokens is trained. A step of its sequence is an action token, a state token and the patches of a frame;
its outputs at the patches are those of the next frame. Attention is block-causal: every token attends to all tokens of
the same and of earlier steps. Rotary positions are time, row and column for patches, time only for action and state.

Letters: B batch, T frames, S patches per frame, D width of the encoder, A and K widths of actions and states.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.atomic import atomic_file
from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa import convert
from blueberry_video.nn.blocks import init_trunc_normal
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.rope import Rotation, channels_per_axis, grid_positions, rotate, rotation
from blueberry_video.weights.files import num_blocks
from blueberry_video.weights.load import load_strictly, num_heads_of

PUBLISHED_HEADS = {1408: "22"}  # width of the encoder -> heads
CONDITIONS = 2  # tokens of a step before its patches: the action, then the state

Past = tuple[Tensor, Tensor]  # KV cache of a layer: rotated keys and values (B, heads, N, head_dim)


class WorldModel(nn.Module):
    """Predicts the latents of future frames from those of the first frame, the actions and the states.

    Latents (B, T, S, D) are tokens of the encoder after a LayerNorm without affine; so are predictions.

    Args:
        encoder: accepts single frames (``images=True``); it is frozen and stays in evaluation mode.
        action_dim: width A of an action; the number of discrete actions, which are one-hot vectors.
        state_dim: width K of a state.
        predictor_dim, predictor_depth, predictor_num_heads: width, blocks and heads of the predictor.
        mlp_ratio: hidden over outer width of its MLPs.
        rope_quirk: rotate as the published weights do, see :mod:`blueberry_video.nn.rope`.
        starts_as_copy: initialize the predictor to the identity, so that training starts from the trivial prediction.
            The published model starts from small random weights.
        use_extrinsics: condition each step also on the pose of the camera, a third token after action and state. The
            published model does not; the weights do not tell, since its files hold this encoder as well.

    Raises:
        ValueError: the encoder does not accept single frames, a width is below 1, heads are too narrow for rotary
            positions, or the predictor is too narrow for ``starts_as_copy``; in ``forward`` and :meth:`rollout`,
            latents, actions or states have invalid shapes.
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
        use_extrinsics: bool = False,
    ):
        super().__init__()
        if not encoder.images:
            raise ValueError("model.encoder.images=false cannot encode single frames: set model.encoder.images=true.")
        for key, width in (("action_dim", action_dim), ("state_dim", state_dim)):
            if width < 1:
                raise ValueError(f"model.{key}={width} must be at least 1.")
        self.encoder = encoder.requires_grad_(False)
        self.action_dim, self.state_dim = action_dim, state_dim
        _, height, width = encoder.grid(encoder.video_size)
        sizes = (predictor_dim, predictor_depth, predictor_num_heads, mlp_ratio, rope_quirk, use_extrinsics)
        self.predictor = Predictor((height, width), encoder.embed_dim, action_dim, state_dim, *sizes)
        if starts_as_copy:
            self.predictor.start_as_copy()

    @property
    def use_extrinsics(self) -> bool:
        """Whether the pose of the camera is an input."""
        return self.predictor.extrinsics_encoder is not None

    def train(self, mode: bool = True) -> "WorldModel":
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode_frames(self, video: Tensor) -> Tensor:
        """Latents of each frame separately: (B, C, T, H, W), normalized as the encoder requires -> (B, T, S, D)."""
        tokens = self.encoder(rearrange(video, "b c t h w -> (b t) c 1 h w"))
        return F.layer_norm(tokens, tokens.shape[-1:]).unflatten(0, (len(video), -1))

    def forward(self, latents: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        """Predicts each frame from the true frames before it (teacher forcing).

        Args:
            latents: (B, T, S, D) of all frames; the last is ignored.
            actions: (B, T-1, A); action t leads from frame t to t + 1.
            states: (B, T, K) or (B, T-1, K); the last of T is ignored.
            extrinsics: pose of the camera (B, T, A - 1) or (B, T-1, A - 1); required with ``use_extrinsics``.

        Returns:
            (B, T-1, S, D), latents of frames 1 to T - 1.
        """
        steps = latents.shape[1] - 1
        if states.shape[1] == steps + 1:
            states = states[:, :-1]
        if extrinsics is not None and extrinsics.shape[1] == steps + 1:
            extrinsics = extrinsics[:, :-1]
        self._check(latents, actions, states, extrinsics, steps, steps + 1)
        return self.predictor(latents[:, :-1], actions, states, None, extrinsics)[0]

    def rollout(self, latents: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        """Predicts frames autoregressively from the first frame, with a KV cache.

        Args:
            latents: (B, 1, S, D) of the first frame.
            actions: (B, T', A), T' of at least 1.
            states: (B, T', K) in which the actions are taken; further states are ignored.
            extrinsics: (B, T', A - 1) with ``use_extrinsics``; further ones are ignored.

        Returns:
            (B, T', S, D), latents of the T' frames after the first.
        """
        steps = actions.shape[1]
        states, extrinsics = states[:, :steps], None if extrinsics is None else extrinsics[:, :steps]
        self._check(latents, actions, states, extrinsics, steps, 1)
        frame, past = latents, None
        predictions = []
        for t in range(steps):
            camera = None if extrinsics is None else extrinsics[:, t : t + 1]
            frame, past = self.predictor(frame, actions[:, t : t + 1], states[:, t : t + 1], past, camera)
            predictions.append(frame)
        return torch.cat(predictions, dim=1)

    def _check(
        self, latents: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None, steps: int, frames: int
    ) -> None:
        if steps < 1:
            raise ValueError("there is no frame to predict: pass at least two frames, or one frame and one action.")
        patches = (math.prod(self.predictor.grid), self.encoder.embed_dim)
        wanted = {
            "latents": (latents, (frames, *patches), "the output of encode_frames"),
            "actions": (actions, (steps, self.action_dim), f"model.action_dim={self.action_dim}"),
            "states": (states, (steps, self.state_dim), f"model.state_dim={self.state_dim}"),
        }
        if (extrinsics is not None) != self.use_extrinsics:
            raise ValueError(
                f"model.use_extrinsics={str(self.use_extrinsics).lower()}, but extrinsics were "
                f"{'not passed' if extrinsics is None else 'passed'}: the pose of the camera (B, T, "
                f"{self.action_dim - 1}) is an input of models with model.use_extrinsics=true only."
            )
        if extrinsics is not None:
            origin = f"model.action_dim={self.action_dim} less the gripper"
            wanted["extrinsics"] = (extrinsics, (steps, self.action_dim - 1), origin)
        for name, (value, shape, origin) in wanted.items():
            if tuple(value.shape) != (len(latents), *shape):
                raise ValueError(
                    f"{name} have the shape {tuple(value.shape)}, but {(len(latents), *shape)} is required ({origin}): "
                    "use data and a model of the same sizes."
                )

    # ---- published weights ----

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        use_extrinsics: bool,
        num_frames: int = 16,
        image_size: int = 256,
        num_heads: int | None = None,
        predictor_num_heads: int = 16,
    ) -> Self:
        """Builds V-JEPA 2-AC, encoder included, from an original file. Prints a report.

        Args:
            weights: a torch file with ``encoder`` and ``predictor``.
            use_extrinsics: false for the published weights, true for weights trained with ``use_extrinsics``; the file
                has the same tensors for both.
            num_frames, image_size: size of the clips; by default that of the published model.
            num_heads: heads of the encoder, which no file states.
            predictor_num_heads: defaults to that of the only published model.

        Raises:
            FileNotFoundError, ValueError: see :meth:`load_published`.
        """
        state = convert.read_world_model(weights, use_extrinsics)
        tensors = convert.part(state, "encoder")
        heads = num_heads_of({}, num_heads, len(tensors["patch_embed.proj.bias"]), weights, PUBLISHED_HEADS)
        encoder = vit.VisionTransformer.from_weights(
            tensors, weights, heads, num_frames, image_size, images=True, positions="rope_3d", rope_quirk=True
        )
        dim, action_dim = state["predictor.action_encoder.weight"].shape
        state_dim, depth = state["predictor.state_encoder.weight"].shape[1], num_blocks(state, "predictor.blocks")
        mlp_ratio = state["predictor.blocks.0.mlp.fc1.weight"].shape[0] / dim
        sizes = (action_dim, state_dim, dim, depth, predictor_num_heads, mlp_ratio)
        model = cls(encoder, *sizes, rope_quirk=True, use_extrinsics=use_extrinsics)
        print(f"V-JEPA 2-AC for frames of {image_size} pixels: {model._load(state, weights)}")
        return model

    def load_published(self, weights: str | Path) -> str:
        """Loads weights of an original file and returns a sentence on what was loaded. ``use_extrinsics`` of the model
        must be that of their training.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or tensors are missing, unexpected or of a different shape.
        """
        return self._load(convert.read_world_model(weights, self.use_extrinsics), weights)

    def _load(self, state: dict[str, Tensor], source: str | Path) -> str:
        load_strictly(self, state, source, "Choose the model=world_model/… with the sizes of these weights.")
        return f"loaded {len(state)} tensors from {source}: its 'encoder' and 'predictor'"

    def save_published(self, path: str | Path) -> None:
        """Writes a torch file in the layout of V-JEPA 2-AC; an existing file is replaced."""
        content = convert.world_model_to_original(self.state_dict())
        with atomic_file(Path(path)) as file:
            torch.save(content, file)


class Predictor(nn.Module):
    """Block-causal transformer of a :class:`WorldModel` for frames of a patch grid (h, w)."""

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int,
        action_dim: int,
        state_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        rope_quirk: bool,
        use_extrinsics: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"model.predictor_num_heads={num_heads} must be a divisor of model.predictor_dim={dim}.")
        channels_per_axis(dim // num_heads)  # raises here, not in forward
        self.grid, self.head_dim, self.rope_quirk = grid, dim // num_heads, rope_quirk
        self.embed = nn.Linear(embed_dim, dim)
        self.action_encoder = nn.Linear(action_dim, dim)
        self.state_encoder = nn.Linear(state_dim, dim)
        self.extrinsics_encoder = nn.Linear(action_dim - 1, dim) if use_extrinsics else None
        self.num_conditions = CONDITIONS + use_extrinsics
        self.blocks = nn.ModuleList(CausalBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, embed_dim)
        init_trunc_normal(self)

    def forward(
        self,
        latents: Tensor,
        actions: Tensor,
        states: Tensor,
        past: list[Past] | None = None,
        extrinsics: Tensor | None = None,
    ) -> tuple[Tensor, list[Past]]:
        """Predicts the frame after each of T consecutive frames.

        Args:
            latents, actions, states: (B, T, S, D), (B, T, A) and (B, T, K) of these frames.
            past: KV cache of all earlier steps, as returned; ``None`` at the first step.
            extrinsics: (B, T, A - 1), if the model has their encoder.

        Returns:
            Predictions (B, T, S, D), normalized like latents, and the KV cache of each layer.
        """
        conditions = [self.action_encoder(actions), self.state_encoder(states)]  # (B, T, dim) each
        if self.extrinsics_encoder is not None:
            conditions.append(self.extrinsics_encoder(extrinsics))
        x = torch.cat([torch.stack(conditions, dim=2), self.embed(latents)], dim=2)
        steps, tokens = x.shape[1:3]
        first = past[0][0].shape[2] // tokens if past else 0
        turn = self._rotation(first, steps, x)
        mask = block_causal_mask(first, steps, tokens, x.device) if steps > 1 else None
        x = x.flatten(1, 2)
        kept = []
        for number, block in enumerate(self.blocks):
            x, keys_values = block(x, turn, mask, past[number] if past else None)
            kept.append(keys_values)
        x = self.proj(self.norm(x.unflatten(1, (steps, tokens))[:, :, self.num_conditions :]))
        return F.layer_norm(x, x.shape[-1:]), kept

    @torch.no_grad()
    def start_as_copy(self) -> None:
        """Initializes to the identity: the residual branches are zero, and ``proj`` inverts ``embed``.

        Raises:
            ValueError: ``dim`` is not above ``embed_dim``.
        """
        dim, embed_dim = self.embed.weight.shape
        if dim <= embed_dim:
            raise ValueError(
                f"model.starts_as_copy=true requires model.predictor_dim={dim} above the width of the encoder, "
                f"{embed_dim}: increase it, or set model.starts_as_copy=false."
            )
        columns = torch.randn_like(self.embed.weight)
        columns -= columns.mean(dim=0)  # the norm before proj removes the mean
        rotation, _ = torch.linalg.qr(columns)
        self.embed.weight.copy_(rotation)
        self.proj.weight.copy_(rotation.T)
        for block in cast(Iterable[CausalBlock], self.blocks):
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)

    def _rotation(self, first: int, steps: int, like: Tensor) -> Rotation:
        """Rotation (steps * tokens, head_dim) of the tokens of ``steps`` steps, the first of index ``first``."""
        patches = grid_positions((1, *self.grid))
        positions = torch.cat([patches.new_zeros(self.num_conditions, 3), patches]).repeat(
            steps, 1, 1
        )  # (steps, tokens, 3)
        positions[..., 0] = torch.arange(first, first + steps)[:, None]
        cos, sin = rotation(positions.flatten(0, 1), self.head_dim, self.rope_quirk)
        dtype = torch.promote_types(like.dtype, torch.float32)  # half precision would round the positions
        return Rotation(cos.to(like.device, dtype), sin.to(like.device, dtype))


def block_causal_mask(first: int, steps: int, tokens: int, device: torch.device) -> Tensor:
    """Attention mask, bool (steps * tokens, (first + steps) * tokens): true for keys of the same or an earlier step.

    The queries are ``steps`` steps of ``tokens`` tokens, after ``first`` earlier steps.
    """
    step = torch.arange(first + steps, device=device).repeat_interleave(tokens)
    return step[first * tokens :, None] >= step


class CausalAttention(nn.Module):
    """Multi-head attention to the tokens of given steps and to the KV cache of earlier steps."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """Attends (B, N, dim) -> (B, N, dim), and appends these tokens to the KV cache.

        Args:
            x: tokens.
            turn: rotation of the tokens.
            mask: bool (N, N_past + N); ``None`` attends to all.
            past: KV cache of the N_past earlier tokens.
        """
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, h=self.num_heads)
        q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, head_dim)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), (k, v)


class CausalBlock(nn.Module):
    """Pre-norm transformer block with :class:`CausalAttention`, with the same arguments and results."""

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
