"""HunyuanVideo-1.5 (Tencent; weights in its layout and in diffusers').

Unlike HunyuanVideo, it has only dual-stream blocks, and no pooled text. The text stream concatenates the tokens of up
to three encoders, each with an added type embedding: a language model's, refined; ByT5's, of the letters to be drawn;
for image-to-video an image encoder's. One network does text- and image-to-video: the clean first frame, or zeros, and a
channel that marks it are always concatenated to the noisy latents.

Letters: B clips, C latent channels, T latent frames, H W latent rows and columns, L text tokens, D width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.diffusion_transformer import check_tokens, text_timestep
from blueberry_video.models.hunyuan_video.token_refiner import SINUSOID
from blueberry_video.models.hunyuan_video.transformer import Condition, DualStreamTransformer, padding_mask
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.nn.timestep_conditioning import TimestepMLP, sinusoidal
from blueberry_video.weights.diffusers_folder import write_folder

LETTERS_HIDDEN = 2048  # hidden width of the projection of ByT5's tokens
TEXT, LETTERS, IMAGE = range(3)  # rows of the type embedding


class LettersProjection(nn.Module):
    """Projection of ByT5's tokens: (B, L, letters_dim) -> (B, L, D)."""

    def __init__(self, letters_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(letters_dim)
        self.linear_1 = nn.Linear(letters_dim, LETTERS_HIDDEN)
        self.linear_2 = nn.Linear(LETTERS_HIDDEN, LETTERS_HIDDEN)
        self.linear_3 = nn.Linear(LETTERS_HIDDEN, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_3(F.gelu(self.linear_2(F.gelu(self.linear_1(self.norm(x))))))


class ImageProjection(nn.Module):
    """Projection of an image encoder's tokens: (B, L, image_dim) -> (B, L, D)."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(image_dim)
        self.linear_1 = nn.Linear(image_dim, image_dim)
        self.linear_2 = nn.Linear(image_dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))


class HunyuanVideo15(DualStreamTransformer):
    """HunyuanVideo-1.5 transformer: latents (B, 2 C + 1, T, H, W), timestep and text -> (B, C, T, H, W).

    Args:
        in_channels: 2 C + 1: noisy latents, the clean first frame or zeros, and the channel that marks it.
        out_channels: C.
        depth: blocks, all dual-stream.
        text_dim: width of the language model's tokens.
        letters_dim: width of ByT5's tokens.
        image_dim: width of the image encoder's tokens.
        meanflow: take the end of a step as a second timestep, as the super-resolution models do.
        patch_size, num_heads, head_dim, refiner_depth, mlp_ratio, rope_axes, rope_theta, causal_chunk, checkpointing:
            see :class:`.transformer.DualStreamTransformer`.
        zero_init: zero modulation and output, see :meth:`.transformer.DualStreamTransformer.init_weights`.

    Raises:
        ValueError: for settings that do not fit together.
    """

    family = "HunyuanVideo-1.5"
    diffusers_class = "HunyuanVideo15Transformer3DModel"
    image_condition = "optional"

    def __init__(
        self,
        in_channels: int = 65,
        out_channels: int = 32,
        patch_size: tuple[int, int, int] = (1, 1, 1),
        num_heads: int = 16,
        head_dim: int = 128,
        depth: int = 54,
        refiner_depth: int = 2,
        mlp_ratio: float = 4.0,
        text_dim: int = 3584,
        letters_dim: int = 1472,
        image_dim: int = 1152,
        meanflow: bool = False,
        rope_axes: tuple[int, int, int] = (16, 56, 56),
        rope_theta: float = 256.0,
        causal_chunk: int = 0,
        zero_init: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__(
            in_channels,
            out_channels,
            patch_size,
            num_heads,
            head_dim,
            depth,
            0,
            refiner_depth,
            mlp_ratio,
            text_dim,
            rope_axes,
            rope_theta,
            causal_chunk,
            checkpointing,
        )
        if in_channels != 2 * out_channels + 1:
            raise ValueError(
                f"in_channels={in_channels} with out_channels={out_channels} must be {2 * out_channels + 1}: noisy "
                "latents, latents of the first frame, and the channel that marks it."
            )
        dim = num_heads * head_dim
        self.letters_dim, self.image_dim, self.meanflow = letters_dim, image_dim, meanflow
        self.image_embedder = ImageProjection(image_dim, dim)
        self.context_embedder_2 = LettersProjection(letters_dim, dim)
        self.time_embed = nn.ModuleDict({"timestep_embedder": TimestepMLP(SINUSOID, dim, dim)})
        if meanflow:
            self.time_embed["timestep_embedder_r"] = TimestepMLP(SINUSOID, dim, dim)
        self.cond_type_embed = nn.Embedding(3, dim)
        self.init_weights(zero_init)

    def unused_parts(self) -> list[nn.Module]:
        """Also the projections of ByT5 and of the image encoder, which a text-to-video model does not have."""
        return [*super().unused_parts(), self.context_embedder_2, self.image_embedder]

    @property
    def image_dropout(self) -> float:
        """Share of training clips without image conditioning: 0.7 in published training (``i2v_prob`` 0.3 in its
        train.py), 1 for a causal model, which continues from frames instead of an image."""
        return 1.0 if self.causal_chunk else 0.7

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
        letters: Tensor | None = None,
        letters_mask: Tensor | None = None,
        image: Tensor | None = None,
        end_timestep: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer`.

        Args:
            latents: (B, 2 C + 1, T, H, W), see :func:`~blueberry_video.diffusion.conditioning.concat_image`.
            pooled, guidance: must be ``None``.
            letters: ByT5's tokens (B, L', letters_dim); ``None``: no text is drawn in the video.
            letters_mask: bool (B, L'), false at padding.
            image: tokens (B, L'', image_dim) of the first frame; ``None``: text-to-video.
            end_timestep: of the shape of ``timestep``; only with ``meanflow``.
        """
        self.check_inputs(latents, timestep, text, text_mask, cache, first_frame)
        if pooled is not None or guidance is not None:
            raise ValueError("HunyuanVideo-1.5 takes neither pooled text nor a guidance scale: pass None for both.")
        shape = None if end_timestep is None else end_timestep.shape
        if shape != (timestep.shape if self.meanflow else None):
            raise ValueError(
                f"end_timestep has the shape {None if shape is None else tuple(shape)}: with meanflow={self.meanflow} "
                f"it must be {tuple(timestep.shape) if self.meanflow else None}."
            )
        of_text = text_timestep(timestep)
        streams: list[tuple[int, Tensor, Tensor | None]] = [(TEXT, text, text_mask)]
        if letters is not None:
            check_tokens("letters", letters, letters_mask, len(text), "letters_dim", self.letters_dim)
            streams.append((LETTERS, letters, letters_mask))
        if image is not None:
            check_tokens("image", image, None, len(text), "image_dim", self.image_dim)
            streams.append((IMAGE, image, None))
        text_mask = padding_mask(_joint_mask([(tokens, mask) for _, tokens, mask in streams]))
        embedded = None
        if not first_frame:
            embedded = torch.cat([self._embed(*stream, of_text) for stream in streams], dim=1)
        condition, text_condition = self._embedded(timestep.reshape(len(timestep), -1), end_timestep), None
        if timestep.ndim == 2:
            text_condition = self._embedded(of_text[:, None], of_text if self.meanflow else None)
        modulation = Condition(condition, text_condition, condition)
        text_len = sum(tokens.shape[1] for _, tokens, _ in streams)
        latents = latents.to(self.proj_out.weight.dtype)
        return self.run(latents, embedded, text_len, text_mask, modulation, cache, first_frame)

    def _embed(self, kind: int, tokens: Tensor, mask: Tensor | None, timestep: Tensor) -> Tensor:
        tokens = tokens.to(self.proj_out.weight.dtype)
        if kind == TEXT:
            embedded = self.context_embedder(tokens, timestep, padding_mask(mask))
        else:
            embedded = (self.context_embedder_2 if kind == LETTERS else self.image_embedder)(tokens)
        return embedded + self.cond_type_embed.weight[kind]

    def _embedded(self, timesteps: Tensor, end_timesteps: Tensor | None) -> Tensor:
        """(B, K) -> (B, K, D)."""
        embedded = self.time_embed["timestep_embedder"](sinusoidal(timesteps, SINUSOID))
        if end_timesteps is None:
            return embedded
        end = sinusoidal(end_timesteps.reshape(timesteps.shape), SINUSOID)
        return embedded + self.time_embed["timestep_embedder_r"](end)

    # ---- published weights ----

    @classmethod
    def settings_of(cls, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
        return super().settings_of(state, config) | {
            "letters_dim": len(state["context_embedder_2.norm.weight"]),
            "image_dim": len(state["image_embedder.norm_in.weight"]),
            "meanflow": "time_embed.timestep_embedder_r.linear_1.weight" in state,
        }

    def save_published(self, folder: str | Path, task: str = "t2v", target_size: int = 640) -> None:
        """Writes a folder that diffusers' ``HunyuanVideo15Transformer3DModel.from_pretrained`` loads.

        Args:
            folder: must not exist, or be empty.
            task: ``"t2v"`` or ``"i2v"``, read by diffusers' pipelines.
            target_size: shorter side of the videos of these pipelines in pixels: 640 (480p) or 960 (720p).

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: diffusers has no such model.
        """
        self.check_square_patches()
        config = self.config() | self.recorded | {"task_type": task, "target_size": target_size}
        write_folder(folder, config, self.state_dict())

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "text_embed_2_dim": self.letters_dim,
            "image_embed_dim": self.image_dim,
            "use_meanflow": self.meanflow,
        }


def _joint_mask(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Concatenated padding masks of token sequences, or ``None`` if there are none."""
    if all(mask is None for _, mask in parts):
        return None
    ones = [tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask for tokens, mask in parts]
    return torch.cat(ones, dim=1)
