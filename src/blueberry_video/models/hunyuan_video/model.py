"""HunyuanVideo (arXiv 2412.03603; Tencent's weights, in their layout and in diffusers').

Text is a stream parallel to the video, with separate weights in the first blocks and shared ones in the rest; attention
is joint in all blocks. The text tokens of a language model pass through a refiner, conditioned on the timestep.
Modulation comes from the timestep, a pooled text embedding and, in the distilled model, the guidance scale that it
imitates. Rotary positions are integers, with a base of 256.

In addition, a clip may have a timestep per frame (Diffusion Forcing, arXiv 2407.01392), and attention may be causal by
chunks of frames; the text then has timestep 0 and attends only to itself. The text is prepended to the video, as the KV
cache requires; no output depends on this order.

Letters: B clips, C latent channels, T latent frames, H W latent rows and columns, L text tokens, D width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blueberry_video.models.diffusion_transformer import text_timestep
from blueberry_video.models.hunyuan_video.token_refiner import SINUSOID
from blueberry_video.models.hunyuan_video.transformer import Condition, DualStreamTransformer, padding_mask
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.nn.timestep_conditioning import TimestepMLP, sinusoidal
from blueberry_video.weights.files import num_blocks

GUIDANCE_DTYPES = ("bfloat16", "float32")
IMAGE_CONDITIONS = (None, "latent_concat", "token_replace")


class HunyuanVideo(DualStreamTransformer):
    """HunyuanVideo transformer: latents (B, C, T, H, W), timestep and text -> (B, out_channels, T, H, W).

    Args:
        in_channels: channels of the latents; with ``image_condition="latent_concat"`` those of
            :func:`~blueberry_video.diffusion.conditioning.concat_image`: 2 C + 1.
        out_channels: channels of the output.
        pooled_dim: width of the pooled text embedding; 0 for none (no published model).
        embedded_guidance: take the guidance scale as an input, as the distilled model does.
        guidance_dtype: precision in which 1000 times the guidance scale is computed: ``"bfloat16"``, as published, or
            ``"float32"``. The published pipelines, Tencent's and diffusers', run in bfloat16 and embed 6016 for a scale
            of 6. Here the rounding is the same in any precision of the weights.
        image_condition: conditioning on the first frame: ``None``, ``"latent_concat"`` (along channels, see
            ``concat_image``) or ``"token_replace"`` (it replaces the first latent frame, at timestep 0).
        patch_size, num_heads, head_dim, depth, single_depth, refiner_depth, mlp_ratio, text_dim, rope_axes, rope_theta,
            causal_chunk, checkpointing: see :class:`.transformer.DualStreamTransformer`.
        zero_init: zero modulation and output, see :meth:`.transformer.DualStreamTransformer.init_weights`.

    Raises:
        ValueError: for settings that do not fit together.
    """

    family = "HunyuanVideo"
    diffusers_class = "HunyuanVideoTransformer3DModel"
    image_dropout = 0.0

    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_heads: int = 24,
        head_dim: int = 128,
        depth: int = 20,
        single_depth: int = 40,
        refiner_depth: int = 2,
        mlp_ratio: float = 4.0,
        text_dim: int = 4096,
        pooled_dim: int = 768,
        embedded_guidance: bool = False,
        guidance_dtype: str = "bfloat16",
        image_condition: str | None = None,
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
            single_depth,
            refiner_depth,
            mlp_ratio,
            text_dim,
            rope_axes,
            rope_theta,
            causal_chunk,
            checkpointing,
        )
        if image_condition not in IMAGE_CONDITIONS:
            raise ValueError(
                f"image_condition={image_condition!r} is unknown: choose null, 'latent_concat' or 'token_replace'."
            )
        if guidance_dtype not in GUIDANCE_DTYPES:
            raise ValueError(f"guidance_dtype={guidance_dtype!r} must be one of {', '.join(GUIDANCE_DTYPES)}.")
        expected = 2 * out_channels + 1 if image_condition == "latent_concat" else out_channels
        if in_channels != expected:
            raise ValueError(
                f"in_channels={in_channels} with out_channels={out_channels}: image_condition={image_condition!r} "
                f"needs in_channels={expected}."
            )
        self.pooled_dim, self.embedded_guidance, self.image_condition = pooled_dim, embedded_guidance, image_condition
        self.guidance_dtype = guidance_dtype
        dim = num_heads * head_dim
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepMLP(SINUSOID, dim, dim)})
        if pooled_dim:
            self.time_text_embed["text_embedder"] = TimestepMLP(pooled_dim, dim, dim)
        if embedded_guidance:
            self.time_text_embed["guidance_embedder"] = TimestepMLP(SINUSOID, dim, dim)
        self.init_weights(zero_init)

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
    ) -> Tensor:
        """See :class:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer`."""
        self.check_inputs(latents, timestep, text, text_mask, cache, first_frame)
        self._check_conditioning(len(latents), pooled, guidance)
        dtype = self.proj_out.weight.dtype
        latents, text_mask, of_text = latents.to(dtype), padding_mask(text_mask), text_timestep(timestep)
        constant = self._constant(pooled, guidance)
        output = self._embedded(timestep.reshape(len(timestep), -1)) + constant  # (B, K, D)
        text_condition = None if timestep.ndim == 1 else self._embedded(of_text[:, None]) + constant
        video = output
        if self.image_condition == "token_replace" and not first_frame:
            text_condition = output if text_condition is None else text_condition
            still = self._embedded(torch.zeros_like(of_text)[:, None]) + self._constant(pooled, None)
            video = torch.cat([still, output.expand(-1, self.grid(latents)[0], -1)[:, 1:]], dim=1)
        embedded = None if first_frame else self.context_embedder(text.to(dtype), of_text, text_mask)
        condition = Condition(video, text_condition, output)
        return self.run(latents, embedded, text.shape[1], text_mask, condition, cache, first_frame)

    def _embedded(self, timesteps: Tensor) -> Tensor:
        """(B, K) -> (B, K, D)."""
        return self.time_text_embed["timestep_embedder"](sinusoidal(timesteps, SINUSOID))

    def _constant(self, pooled: Tensor | None, guidance: Tensor | None) -> Tensor | float:
        """Part of the condition that does not depend on the timestep: (B, 1, D), or 0."""
        constant: Tensor | float = 0.0
        if pooled is not None:
            constant = self.time_text_embed["text_embedder"](pooled)[:, None]
        if guidance is not None:
            of_guidance = sinusoidal(thousandfold(guidance, self.guidance_dtype), SINUSOID)
            constant = constant + self.time_text_embed["guidance_embedder"](of_guidance)[:, None]
        return constant

    def _check_conditioning(self, batch: int, pooled: Tensor | None, guidance: Tensor | None) -> None:
        shape = None if pooled is None else tuple(pooled.shape)
        expected = (batch, self.pooled_dim) if self.pooled_dim else None
        if shape != expected:
            raise ValueError(
                f"pooled has the shape {shape}: with pooled_dim={self.pooled_dim} it must be {expected}. Set the "
                "model's pooled_dim to the width of the text encoder's pooled embedding, 0 if it has none."
            )
        if (guidance is not None) != self.embedded_guidance or (guidance is not None and guidance.shape != (batch,)):
            given = None if guidance is None else tuple(guidance.shape)
            needed = f"a scale per clip, {(batch,)}" if self.embedded_guidance else "None"
            raise ValueError(
                f"guidance has the shape {given}: with embedded_guidance={self.embedded_guidance} it must be {needed}. "
                "Only the guidance-distilled model takes a scale; a model without it runs twice, with and without text."
            )

    # ---- published weights ----

    @classmethod
    def settings_of(cls, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
        settings = super().settings_of(state, config)
        pooled = state.get("time_text_embed.text_embedder.linear_1.weight")
        concatenated = settings["in_channels"] == 2 * settings["out_channels"] + 1
        return settings | {
            "single_depth": num_blocks(state, "single_transformer_blocks"),
            "pooled_dim": 0 if pooled is None else pooled.shape[1],
            "embedded_guidance": "time_text_embed.guidance_embedder.linear_1.weight" in state,
            "guidance_dtype": config.get("guidance_dtype", "bfloat16"),
            "image_condition": "latent_concat" if concatenated else config.get("image_condition_type"),
        }

    def save_published(self, folder: str | Path) -> None:
        if not self.pooled_dim:
            raise ValueError("diffusers has no HunyuanVideo with pooled_dim=0: it needs a pooled text embedding.")
        super().save_published(folder)

    def config(self) -> dict[str, Any]:
        config = super().config() | {
            "num_single_layers": len(self.single_transformer_blocks),
            "guidance_embeds": self.embedded_guidance,
            "pooled_projection_dim": self.pooled_dim,
            "image_condition_type": self.image_condition,
        }
        # diffusers has no such setting, and ignores it with a warning
        return config | ({} if self.guidance_dtype == "bfloat16" else {"guidance_dtype": self.guidance_dtype})


def thousandfold(guidance: Tensor, dtype: str) -> Tensor:
    """1000 times a guidance scale (B,), float32; with ``"bfloat16"``, scale and product have 8 significant bits.

    The rounding is written as arithmetic, because torch.compile removes a conversion to bfloat16 and back.
    """
    if dtype == "float32":
        return 1000 * guidance.float()
    return eight_bits(1000 * eight_bits(guidance.float()))


def eight_bits(x: Tensor) -> Tensor:
    """Rounds float32 to 8 significant bits, ties to even, as a conversion to bfloat16."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 256).round() / 256, exponent)
