"""Spool: temporal attention over the features of frames that an image backbone sees one by one
(github.com/achalghoum/spool).

Unusual about it: time is seen by attention heads of two kinds, one that looks back and one that looks ahead, each at
most ``local_frame_range`` frames far (:mod:`.attention`). Two learned *context frames* stand
before the first frame and behind the last. They see the whole video and are seen by every frame, so that what is far
apart meets there from the second block on; at the end their means are the vector of the video.

The original takes the name of a backbone (``backbone_name``); here the backbone is a network of its own in the config,
any encoder of this package that takes single frames: `override /model@model.encoder.backbone: dinov2/small` in an
experiment, or ``model@model.encoder.backbone=dinov2/small`` on the command line, chooses it by its name in conf/model/.
In Python it is passed as ``backbone``.

Letters: B batch, T frames, S tokens a frame, D width.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.spool.attention import FrameAttention, FrameBlock, FrameLayout, Past, check_heads
from blueberry_video.models.vit import init_weights
from blueberry_video.nn.kept_tokens import KeptTokens
from blueberry_video.nn.positions import sinusoid


class Features(NamedTuple):
    """What Spool makes of a video."""

    features: Tensor  # (B, T + 2, S, D): the start frame, the frames, the end frame
    context: Tensor  # (B, 2 D): the means of the start frame and of the end frame, side by side


class StreamState(NamedTuple):
    """What a stream keeps of the frames it has seen; its size does not depend on their number."""

    frames: int  # seen so far
    past: tuple[Past, ...]  # one a layer
    start: Tensor  # (B, S, D): the start frame behind the last layer


class Spool(Encoder):
    """Encoder of video float (B, C, T, H, W), normalised as the backbone wants it -> tokens (B, N, D) of the frames;
    :meth:`features` also gives the context frames. T may be any number from 1.

    Hidden tokens (``keep``) reach neither the backbone nor the blocks: a frame is encoded from its visible patches
    alone, and the masks of the blocks go by the frame of each token. The context frames keep all of their S tokens.

    Args:
        backbone: sees every frame by itself; ``backbone.images`` must be true. It sets the width D and the patches.
        num_hidden_layers: number of temporal blocks; 0 leaves the features of the backbone.
        num_attention_heads, num_lookahead_heads, num_lookback_heads: heads of a block, and how many of them look ahead
            and back; ``num_lookahead_heads=None`` is the rest of them.
        image_size: height and width in pixels, those of the backbone.
        num_frames: frames of the clips it is trained with.
        local_frame_range: how many frames a head sees beside its own.
        context_mode: ``"both"`` context frames are seen by all heads; ``"split"``: those that look back see the start
            frame, those that look ahead the end frame; ``"causal"``: frames know the past alone, so that
            :meth:`stream` can be exact. The weights are the same in all three.
        freeze_backbone: do not train the backbone; it then stays in evaluation mode.
        temporal_sinusoid: add to all tokens a sinusoid of the number of their frame. Without it the masks alone tell
            order, and only as far as heads of one kind see less than the other.
        mlp_ratio: hidden over outer width of the MLPs.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        final_norm: LayerNorm after the last block.
        in_channels: colour channels C.

    Attributes:
        context_dim: 2 D, the width of the context; 0 without temporal blocks, where it knows nothing of the video.

    Raises:
        ValueError: for a backbone that takes no single frames or is of another size, and heads that do not add up or do
            not divide the width; in use, for a video of another size or without frames.
    """

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
                f"the backbone was built for (C, H, W) = {(channels, *size)} and Spool for "
                f"{(in_channels, image_size, image_size)}: give model.encoder and model.encoder.backbone the same "
                "image_size and in_channels."
            )
        if not backbone.images:
            raise ValueError(
                "model.encoder.backbone.images=false: Spool shows its backbone every frame alone. Write "
                "`model.encoder.backbone.images=true`; it changes no weights."
            )
        if num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers={num_hidden_layers} is negative: use 0 for the backbone alone.")
        if num_lookahead_heads is None:
            num_lookahead_heads = num_attention_heads - num_lookback_heads
        looks = num_lookback_heads, num_lookahead_heads, local_frame_range, context_mode
        heads = backbone.embed_dim, num_attention_heads, *looks
        check_heads(*heads)  # also where there are no blocks
        self.backbone, self.freeze_backbone = backbone, freeze_backbone
        self.temporal_sinusoid, self.streams = temporal_sinusoid, context_mode == "causal"
        self.num_heads = num_attention_heads
        _, h, w = self.grid(self.video_size)
        self.context_dim, self.tokens_per_frame = 2 * self.embed_dim if num_hidden_layers else 0, h * w
        self.context_frames = nn.Parameter(torch.empty(2, h * w, self.embed_dim))
        self.blocks = nn.ModuleList()
        for rate in torch.linspace(0, drop_path, num_hidden_layers, device="cpu").tolist():
            self.blocks.append(FrameBlock(FrameAttention(*heads), self.embed_dim, mlp_ratio, rate))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6) if final_norm else nn.Identity()
        nn.init.trunc_normal_(self.context_frames, std=0.02)
        self.blocks.apply(init_weights)
        if freeze_backbone:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "Spool":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def as_clip(self, video: Tensor) -> Tensor:
        """As :meth:`Encoder.as_clip`, but of any number of frames from 1."""
        channels, _, *size = self.video_size
        if video.ndim != 5 or [video.shape[1], *video.shape[3:]] != [channels, *size] or not video.shape[2]:
            raise ValueError(
                f"the video has (B, C, T, H, W) = {tuple(video.shape)} but the encoder was built for C = {channels}, "
                f"(H, W) = {tuple(size)} and any T of 1 or more: give the data and model.encoder the same image_size, "
                "and a video with frames."
            )
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        clip = self.as_clip(video)
        if keep is None:
            _, frames, _ = self._mix(self._see(clip), None)
            return frames.flatten(1, 2)
        kept = KeptTokens(keep, len(clip), self.grid(clip.shape))
        _, frames, _ = self._mix(kept.encode(clip, self._look), kept.valid())
        return kept.pick(frames)

    def features(self, video: Tensor) -> Features:
        """(B, C, T, H, W) -> the features of all frames and of the context frames, and the vector of the video."""
        start, frames, end = self._mix(self._see(self.as_clip(video)), None)
        return Features(torch.cat([start[:, None], frames, end[:, None]], dim=1), _context(start, end))

    def context(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 2 D): what a classifier pools with ``pooling: context``."""
        return self.features(video).context

    @torch.no_grad()
    def stream(self, frames: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """The next frame of a video (or several), in constant memory and time however long the video is.

        It needs ``context_mode="causal"``. In the other modes a context frame knows the whole video, and every frame
        knows the context frames: from the second block on, no frame is final before the last has come. Call it in
        evaluation mode: stochastic depth would drop other layers of every frame.

        Args:
            frames: (B, C, n, H, W), normalised as the backbone wants it.
            state: what the call before gave; ``None`` for the first.

        Returns:
            The features (B, n * S, D), as :meth:`forward` gives them for the whole video, and the next state. No
            gradient goes through either.

        Raises:
            ValueError: for a model that is not causal, a frame of another size, or a state of other videos.
        """
        if not self.streams:
            raise ValueError(
                "stream() needs model.encoder.context_mode=causal, with num_lookback_heads="
                f"{self.num_heads} and num_lookahead_heads=0: in other modes every frame knows the whole video by the "
                "context frames. The weights stay the same."
            )
        seen = self._see(self.as_clip(frames))
        if state is None:
            state = self._begin(len(frames))
        elif len(state.past) != len(self.blocks) or len(state.start) != len(frames):
            raise ValueError(
                f"the state is of {len(state.past)} layers and {len(state.start)} videos, the model has "
                f"{len(self.blocks)} layers and there are {len(frames)} videos: pass the state that this model gave "
                "for the frames before these."
            )
        x = seen + self._times(range(state.frames + 1, state.frames + 1 + seen.shape[1]), seen)[:, None]
        out, past = self._advance(x.flatten(1, 2), state.past)
        return out, StreamState(state.frames + seen.shape[1], past, state.start)

    @torch.no_grad()
    def stream_context(self, state: StreamState) -> Tensor:
        """The context (B, 2 D) of what a stream has brought so far, as :meth:`context` gives it for that video.

        Only its second half knows the video, and of it as many frames as layers reach: a causal end frame is one more
        frame behind the last.
        """
        end = self.context_frames[1] + self._times(range(state.frames + 1, state.frames + 2), self.context_frames)
        out, _ = self._advance(end.expand(len(state.start), -1, -1), state.past)
        return _context(state.start, out)

    def _see(self, video: Tensor) -> Tensor:
        """Every frame by itself: (B, C, T, H, W) -> (B, T, S, D)."""
        tokens = self._look(rearrange(video, "b c t h w -> (b t) c 1 h w"), None)
        return tokens.unflatten(0, (len(video), -1))

    def _look(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """The backbone, without a graph if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone(frames, keep)

    def _mix(self, seen: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks on (B, T, K, D): the start frame (B, S, D), the frames (B, T, K, D) and the end frame."""
        batch, frames, tokens, _ = seen.shape
        layout = FrameLayout(frames, tokens, self.tokens_per_frame, valid)
        times = self._times(range(frames + 2), seen)[:, None]  # (T + 2, 1, D)
        start, end = self.context_frames[0] + times[0], self.context_frames[1] + times[-1]
        inside = (seen + times[1:-1]).flatten(1, 2)
        x = torch.cat([start.expand(batch, -1, -1), inside, end.expand(batch, -1, -1)], dim=1)
        for block in self.blocks:
            x, _ = block(x, layout)
        start, inside, end = self.norm(x).split(layout.sizes, dim=1)
        return start, inside.unflatten(1, (frames, tokens)), end

    def _times(self, frames: range, like: Tensor) -> Tensor:
        """What is added to the tokens of these frames, (frames, D)."""
        if not self.temporal_sinusoid:
            return like.new_zeros(len(frames), self.embed_dim)
        numbers = torch.arange(frames.start, frames.stop, device="cpu")  # where there is double precision
        return sinusoid(numbers, self.embed_dim).to(like)

    def _begin(self, batch: int) -> StreamState:
        """Before the first frame: the start frame, which sees itself alone, has gone through all layers."""
        start = self.context_frames[0] + self._times(range(1), self.context_frames)
        out, past = self._advance(start.expand(batch, -1, -1), (None,) * len(self.blocks))
        return StreamState(0, past, out)

    def _advance(self, x: Tensor, before: tuple[Past | None, ...]) -> tuple[Tensor, tuple[Past, ...]]:
        """New frames (B, n * S, D) through the layers, and what each of these then keeps."""
        layout, behind = FrameLayout(x.shape[1] // self.tokens_per_frame, self.tokens_per_frame, 0), []
        for block, past in zip(self.blocks, before, strict=True):
            x, present = block(x, layout, past, streaming=True)
            behind.append(present)
        return self.norm(x), tuple(behind)


def _context(start: Tensor, end: Tensor) -> Tensor:
    """The context frames (B, S, D) -> (B, 2 D)."""
    return torch.cat([start.mean(dim=1), end.mean(dim=1)], dim=1)
