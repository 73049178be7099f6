"""Spool: temporal attention over features of frames that an image backbone encodes separately
(github.com/achalghoum/spool).

Lookback and lookahead heads attend to at most ``local_frame_range`` previous or next frames (:mod:`.attention`). Two
learned *context frames*, before the first and after the last frame, attend to the whole video, and every frame attends
to them, so that distant frames interact from the second block on. The means of their outputs are the video's vector.

The config has a backbone, any encoder that takes single frames. It is chosen by its name in conf/model/: `override
/model@model.encoder.backbone: dinov2/small` in an experiment, or ``model@model.encoder.backbone=dinov2/small`` on the
command line. :meth:`Spool.from_backbone` builds a model by the original's ``backbone_name``.

Departures from the original code, which does not run as committed, and has no published weights:

- Both kinds of heads attend to the own frame and to both context frames, and the queries of both context frames attend
  to everything; the original's mask is ``context_mode="original"``.
- The tokens of a frame are its patches; the original keeps the class token of DINOv2.
- A context frame has a learned vector per token, initialized with std 0.02; the original one for all, with std 1.
- No dropout, but optional stochastic depth; the original has a dropout of 0.1 on both branches.
- eps of the LayerNorms is 1e-6, the original's 1e-5.
- By default, a sinusoidal embedding of the frame index and a LayerNorm after the last block; the original has neither:
  ``temporal_sinusoid=False``, ``final_norm=False``.
- Matrices are initialized truncated-normal with std 0.02, the original's as PyTorch does.
- ``image_size`` must be a multiple of the patch size; the original's default of 244 is not one of 14.
- Additions: training of the backbone, masked tokens, streaming with ``context_mode="causal"``, ``"split"``.

Shapes: B batch, T frames, S tokens per frame, D width.
"""

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.spool.attention import FrameAttention, FrameBlock, FrameLayout, Past, check_heads
from blueberry_video.models.vit import init_weights
from blueberry_video.nn.kept_tokens import KeptTokens
from blueberry_video.nn.positions import sinusoid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalization of DINOv2's frames


class Features(NamedTuple):
    """Outputs of Spool for a video."""

    features: Tensor  # (B, T + 2, S, D): the start frame, the frames, the end frame
    context: Tensor  # (B, 2 D): the means of the start frame and of the end frame, concatenated


class StreamState(NamedTuple):
    """State of a stream; its size does not depend on the number of past frames."""

    frames: int  # number of past frames
    past: tuple[Past, ...]  # KV cache per layer
    start: Tensor  # (B, S, D): output of the start frame


class Spool(Encoder):
    """Encoder of video float (B, C, T, H, W), normalized as for the backbone, T >= 1 -> frame tokens (B, N, D).

    Masked tokens (not in ``keep``) reach neither the backbone nor the blocks. The context frames have S tokens each.

    Args:
        backbone: encodes every frame separately; ``backbone.images`` must be true. It sets the width D and the patches.
        num_hidden_layers: number of temporal blocks; 0 returns the features of the backbone.
        num_attention_heads, num_lookahead_heads, num_lookback_heads: heads of a block, in total and of each kind;
            ``num_lookahead_heads=None`` uses the remaining ones.
        image_size: height and width in pixels, equal to the backbone's.
        num_frames: frames of the training clips.
        local_frame_range: number of frames that a head attends to in addition to the own one.
        context_mode: ``"both"``, ``"split"``, ``"causal"`` or ``"original"``, see :mod:`.attention`. ``"causal"``
            permits :meth:`stream`. The weights are the same in all four.
        freeze_backbone: freeze the backbone and keep it in evaluation mode.
        temporal_sinusoid: add a sinusoidal embedding of the frame index to all tokens. Without it only the attention
            masks encode order, as far as they differ between the two kinds of heads.
        mlp_ratio: hidden width of the MLPs over D.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        final_norm: LayerNorm after the last block.
        in_channels: color channels C.

    Attributes:
        context_dim: 2 D, width of the context; 0 without temporal blocks, where it does not depend on the video.

    Raises:
        ValueError: for a backbone that takes no single frames or has a different size, or for heads that do not add up
            or do not divide the width; when called, for a video of a different size or without frames.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    no_weight_decay = ("context_frames",)

    def __init__(
        self,
        backbone: Encoder,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_lookahead_heads: int | None = 6,
        num_lookback_heads: int = 6,
        image_size: int = 224,
        num_frames: int = 16,
        local_frame_range: int = 16,
        context_mode: str = "both",
        freeze_backbone: bool = True,
        temporal_sinusoid: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        final_norm: bool = True,
        in_channels: int = 3,
    ):
        super().__init__(
            image_size, num_frames, backbone.patch_size[1], 1, backbone.embed_dim, in_channels, images=True
        )
        channels, _, *size = backbone.video_size
        if [channels, *size] != [in_channels, image_size, image_size]:
            raise ValueError(
                f"model.encoder.backbone has (C, H, W) = {(channels, *size)} and model.encoder "
                f"{(in_channels, image_size, image_size)}: give both the same image_size and in_channels."
            )
        if not backbone.images:
            raise ValueError(
                "model.encoder.backbone.images=false, but Spool encodes frames separately: set "
                "model.encoder.backbone.images=true; it changes no weights."
            )
        if num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers={num_hidden_layers} must be at least 0, the backbone alone.")
        if num_lookahead_heads is None:
            num_lookahead_heads = num_attention_heads - num_lookback_heads
        heads = num_attention_heads, num_lookback_heads, num_lookahead_heads, local_frame_range, context_mode
        check_heads(self.embed_dim, *heads)  # also without blocks
        self.backbone, self.freeze_backbone = backbone, freeze_backbone
        self.temporal_sinusoid, self.streams = temporal_sinusoid, context_mode == "causal"
        self.num_heads = num_attention_heads
        _, h, w = self.grid(self.video_size)
        self.context_dim, self.tokens_per_frame = 2 * self.embed_dim if num_hidden_layers else 0, h * w
        self.context_frames = nn.Parameter(torch.empty(2, h * w, self.embed_dim))
        self.blocks = nn.ModuleList()
        for rate in torch.linspace(0, drop_path, num_hidden_layers, device="cpu").tolist():
            self.blocks.append(FrameBlock(FrameAttention(self.embed_dim, *heads), self.embed_dim, mlp_ratio, rate))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6) if final_norm else nn.Identity()
        nn.init.trunc_normal_(self.context_frames, std=0.02)
        self.blocks.apply(init_weights)
        if freeze_backbone:
            backbone.requires_grad_(False)

    @staticmethod
    def from_backbone(
        backbone_name: str | Path = "facebook/dinov2-base",
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_lookahead_heads: int | None = 6,
        num_lookback_heads: int = 6,
        image_size: int = 224,
        local_frame_range: int = 16,
        context_mode: str = "both",
        freeze_backbone: bool = True,
        backbone_num_heads: int | None = None,
    ) -> "FrameSpool":
        """Builds a model on published weights of DINOv2, with the arguments and the call of the original code.

        The temporal blocks are untrained. The ``state_dict`` is that of a :class:`Spool`.

        Args:
            backbone_name: hub id, folder in the layout of transformers, or file, see :meth:`.DINOv2.from_published`.
            num_hidden_layers, num_attention_heads, num_lookahead_heads, num_lookback_heads, image_size,
                local_frame_range, context_mode, freeze_backbone: see :class:`Spool`.
            backbone_num_heads: attention heads of the backbone, required for a file without a config.

        Raises:
            FileNotFoundError: there are no such weights, or the hub cannot be reached.
            ValueError: the weights are not those of a DINOv2, or the arguments do not fit them.
        """
        backbone = DINOv2.from_published(backbone_name, image_size=image_size, num_heads=backbone_num_heads)
        return FrameSpool(
            backbone,
            num_hidden_layers,
            num_attention_heads,
            num_lookahead_heads,
            num_lookback_heads,
            image_size,
            local_frame_range=local_frame_range,
            context_mode=context_mode,
            freeze_backbone=freeze_backbone,
            in_channels=backbone.video_size[0],
        )

    def train(self, mode: bool = True) -> "Spool":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def as_clip(self, video: Tensor) -> Tensor:
        """Like :meth:`Encoder.as_clip`, but accepts any number of frames from 1."""
        channels, _, *size = self.video_size
        if video.ndim != 5 or [video.shape[1], *video.shape[3:]] != [channels, *size] or not video.shape[2]:
            raise ValueError(
                f"the video has (B, C, T, H, W) = {tuple(video.shape)}, but the encoder takes C = {channels}, (H, W) = "
                f"{tuple(size)} and T >= 1: give the data and model.encoder the same image_size. For frames (B, T, H, "
                "W, C) call encode_frames."
            )
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        clip = self.as_clip(video)
        if keep is None:
            _, frames, _ = self._mix(self._encode(clip), None)
            return frames.flatten(1, 2)
        kept = KeptTokens(keep, len(clip), self.grid(clip.shape))
        _, frames, _ = self._mix(kept.encode(clip, self._run_backbone), kept.valid())
        return kept.pick(frames)

    def features(self, video: Tensor) -> Features:
        """Encodes a video (B, C, T, H, W) to the features of all frames and context frames, and the context."""
        start, frames, end = self._mix(self._encode(self.as_clip(video)), None)
        return Features(torch.cat([start[:, None], frames, end[:, None]], dim=1), _context(start, end))

    def encode_frames(self, frames: Tensor) -> Features:
        """Encodes frames as the original code takes them: resized to ``image_size`` and normalized as for DINOv2.

        Args:
            frames: (B, T, H, W, C) of any size, uint8, or float in [0, 1].

        Returns:
            The features (B, T + 2, S, D) and the context (B, 2 D), as :meth:`features`.

        Raises:
            ValueError: for a different number of dimensions or channels, no frames, or integers other than uint8.
        """
        channels, _, *size = self.video_size
        is_pixels = frames.dtype == torch.uint8 or frames.is_floating_point()
        if frames.ndim != 5 or frames.shape[4] != channels or 0 in frames.shape or channels != 3 or not is_pixels:
            raise ValueError(
                f"the frames are {tuple(frames.shape)} of {frames.dtype}: expected (B, T, H, W, C) with C = 3, at "
                f"least one frame, uint8 or float in [0, 1], and a model with in_channels=3 (here {channels})."
            )
        like = self.context_frames
        pixels = rearrange(frames, "b t h w c -> (b t) c h w").to(like.device)
        pixels = pixels.to(like.dtype) / 255 if frames.dtype == torch.uint8 else pixels.to(like.dtype)
        if list(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.features(rearrange((pixels - mean) / std, "(b t) c h w -> b c t h w", b=len(frames)))

    def context(self, video: Tensor) -> Tensor:
        """Encodes a video (B, C, T, H, W) to the context (B, 2 D), used by classifiers with ``pooling: context``."""
        return self.features(video).context

    @torch.no_grad()
    def stream(self, frames: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Encodes the next frames of videos in memory and time per frame independent of the length.

        Requires ``context_mode="causal"``: in the other modes every frame depends on the whole video through the
        context frames. Call it in evaluation mode, since stochastic depth would drop different layers per frame.

        Args:
            frames: (B, C, n, H, W), normalized as for the backbone.
            state: state that the previous call returned; ``None`` for the first.

        Returns:
            The features (B, n * S, D), equal to those of :meth:`forward` for the whole video, and the next state,
            without gradients.

        Raises:
            ValueError: for a model that is not causal, frames of a different size, or a state of a different model or
                batch size.
        """
        if not self.streams:
            raise ValueError(
                "stream() requires model.encoder.context_mode=causal, num_lookback_heads="
                f"{self.num_heads} and num_lookahead_heads=0, since in other modes every frame depends on the whole "
                "video. The weights stay the same."
            )
        encoded = self._encode(self.as_clip(frames))
        if state is None:
            state = self._begin(len(frames))
        elif len(state.past) != len(self.blocks) or len(state.start) != len(frames):
            raise ValueError(
                f"the state has {len(state.past)} layers and {len(state.start)} videos, but the model has "
                f"{len(self.blocks)} layers and the input {len(frames)} videos: pass the state that this model "
                "returned for the previous frames."
            )
        total = state.frames + encoded.shape[1]
        x = encoded + self._times(range(state.frames + 1, total + 1), encoded)[:, None]
        out, past = self._advance(x.flatten(1, 2), state.past)
        return out, StreamState(total, past, state.start)

    @torch.no_grad()
    def stream_context(self, state: StreamState) -> Tensor:
        """Context (B, 2 D) of the frames streamed so far, equal to :meth:`context` of that video.

        Only its second half depends on the video, and only on the last frames in reach: in causal mode the end frame is
        an ordinary frame after the last.
        """
        end = self.context_frames[1] + self._times(range(state.frames + 1, state.frames + 2), self.context_frames)
        out, _ = self._advance(end.expand(len(state.start), -1, -1), state.past)
        return _context(state.start, out)

    def _encode(self, video: Tensor) -> Tensor:
        """Encodes every frame separately: (B, C, T, H, W) -> (B, T, S, D)."""
        tokens = self._run_backbone(rearrange(video, "b c t h w -> (b t) c 1 h w"), None)
        return tokens.unflatten(0, (len(video), -1))

    def _run_backbone(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """Runs the backbone, without gradients if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone(frames, keep)

    def _mix(self, encoded: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Applies the blocks to (B, T, K, D); returns the start frame (B, S, D), the frames and the end frame."""
        batch, frames, tokens, _ = encoded.shape
        layout = FrameLayout(frames, tokens, self.tokens_per_frame, valid)
        times = self._times(range(frames + 2), encoded)[:, None]  # (T + 2, 1, D)
        start, end = self.context_frames[0] + times[0], self.context_frames[1] + times[-1]
        inside = (encoded + times[1:-1]).flatten(1, 2)
        x = torch.cat([start.expand(batch, -1, -1), inside, end.expand(batch, -1, -1)], dim=1)
        for block in self.blocks:
            x, _ = block(x, layout)
        start, inside, end = self.norm(x).split(layout.sizes, dim=1)
        return start, inside.unflatten(1, (frames, tokens)), end

    def _times(self, frames: range, like: Tensor) -> Tensor:
        """Temporal position embedding of these frames, (frames, D)."""
        if not self.temporal_sinusoid:
            return like.new_zeros(len(frames), self.embed_dim)
        index = torch.arange(frames.start, frames.stop, device="cpu")  # not every device has double precision
        return sinusoid(index, self.embed_dim).to(like)

    def _begin(self, batch: int) -> StreamState:
        """Initial state: the start frame, which attends to itself only, passed through all layers."""
        start = self.context_frames[0] + self._times(range(1), self.context_frames)
        out, past = self._advance(start.expand(batch, -1, -1), (None,) * len(self.blocks))
        return StreamState(0, past, out)

    def _advance(self, x: Tensor, before: tuple[Past | None, ...]) -> tuple[Tensor, tuple[Past, ...]]:
        """Applies the blocks to new frames (B, n * S, D); returns their output and the updated KV caches."""
        layout, after = FrameLayout(x.shape[1] // self.tokens_per_frame, self.tokens_per_frame, 0), []
        for block, past in zip(self.blocks, before, strict=True):
            x, present = block(x, layout, past, streaming=True)
            after.append(present)
        return self.norm(x), tuple(after)


class FrameSpool(Spool):
    """Spool with the call of the original code: frames (B, T, H, W, C) -> :class:`Features`.

    See :meth:`Spool.encode_frames` for the call, :class:`Spool` for the arguments, and :meth:`Spool.from_backbone`.
    """

    def forward(self, frames: Tensor) -> Features:  # type: ignore[override]
        return self.encode_frames(frames)


def _context(start: Tensor, end: Tensor) -> Tensor:
    """Concatenates the means of the context frames (B, S, D) -> (B, 2 D)."""
    return torch.cat([start.mean(dim=1), end.mean(dim=1)], dim=1)
