"""Base class of video encoders."""

import math
from pathlib import Path

from torch import Tensor, nn

from blueberry_video.weights.diffusers_folder import read_source
from blueberry_video.weights.load import check_config, load_strictly, origin_of_heads


class Encoder(nn.Module):
    """Base class of encoders from a video to tokens: ``encoder(video, keep=None) -> (B, N or N_kept, D)``.

    A subclass defines ``forward(video, keep=None)``: ``video`` float (B, C, T, H, W), ``keep`` indices (B, N_kept) of
    the visible tokens in (t, h, w) raster order, or ``None`` for all tokens.

    Args:
        image_size: height and width in pixels; a multiple of ``patch_size``.
        num_frames: frames per clip; a multiple of ``tubelet_size``.
        patch_size: height and width of a patch in pixels.
        tubelet_size: frames per patch.
        embed_dim: width D of the tokens.
        in_channels: number of channels C.
        images: also accept single frames (T = 1). A frame is repeated over a tubelet, which yields 1 x h x w tokens at
            the positions of the first tokens of a clip (OmniMAE, arXiv 2206.08356).

    Attributes:
        embed_dim: width of the tokens.
        patch_size: size of a patch (t, h, w) in frames and pixels.
        video_size: shape (C, T, H, W) of a clip.
        images: single frames are accepted.
        levels: number of depths that are concatenated in a token, each ``embed_dim / levels`` wide.
        num_heads: attention heads, or ``None``.

    Raises:
        ValueError: a size is not a multiple of the patch size.
    """

    levels: int = 1
    num_heads: int | None = None

    def __init__(
        self,
        image_size: int,
        num_frames: int,
        patch_size: int,
        tubelet_size: int,
        embed_dim: int,
        in_channels: int = 3,
        images: bool = False,
    ):
        super().__init__()
        for key, size, by, patch in (
            ("image_size", image_size, "patch_size", patch_size),
            ("num_frames", num_frames, "tubelet_size", tubelet_size),
        ):
            if size < patch or size % patch:
                nearest = max(round(size / patch), 1) * patch
                raise ValueError(f"{key}={size} must be a multiple of {by}={patch}: the nearest is {nearest}.")
        self.embed_dim, self.images = embed_dim, images
        self.patch_size: tuple[int, int, int] = (tubelet_size, patch_size, patch_size)
        self.video_size: tuple[int, int, int, int] = (in_channels, num_frames, image_size, image_size)

    def grid(self, video_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Number of tokens along (t, h, w) of a video of shape (…, T, H, W); (1, h, w) for a single frame."""
        t, h, w = (size // patch for size, patch in zip(video_shape[-3:], self.patch_size, strict=True))
        return 1 if video_shape[-3] == 1 else t, h, w

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a clip of size :attr:`video_size`."""
        return math.prod(self.grid(self.video_size))

    @property
    def published_settings(self) -> dict[str, int]:
        """Settings that no tensor determines, under the names of ``config.json`` of transformers."""
        return {} if self.num_heads is None else {"num_attention_heads": self.num_heads}

    def as_clip(self, video: Tensor) -> Tensor:
        """Checks the shape of a video float (B, C, T, H, W); repeats a single frame over a tubelet.

        Raises:
            ValueError: (C, T, H, W) is not :attr:`video_size`, nor, with ``images``, that of a single frame.
        """
        channels, _, *size = self.video_size
        if self.images and tuple(video.shape[1:]) == (channels, 1, *size):
            return video.expand(-1, -1, self.patch_size[0], -1, -1)
        if tuple(video.shape[1:]) != self.video_size:
            single = f" or, for single frames, {(channels, 1, *size)}" if self.images else ""
            fix = "" if self.images or video.shape[2] != 1 else "; single frames need model.encoder.images=true"
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])}, but the encoder requires {self.video_size}"
                f"{single}: use the same num_frames and image_size in data and model.encoder{fix}."
            )
        return video

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        """Converts a published state dict, in any layout of this architecture, to the names of this encoder.

        Args:
            state: tensors by name.
            source: origin of the weights, for error messages.

        Raises:
            ValueError: the state dict is of a different architecture.
        """
        return state

    def load_published(self, weights: str | Path) -> str:
        """Loads published weights of this architecture, or the encoder in a checkpoint of a run.

        A final norm that only the file or only the encoder has is ignored: fine-tuning starts from a pre-trained
        encoder without its final norm.

        Args:
            weights: a weight file, a folder in the layout of transformers, or a hub id, see
                :func:`~blueberry_video.weights.diffusers_folder.read_source`.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: tensors are missing, unexpected or of a different shape, or the number of heads differs from
                that in the folder's ``config.json``; the message names them.
        """
        (config, state), own = read_source(weights), self.state_dict()
        inner = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
        is_own = {name for name in own if not name.startswith("norm.")} <= inner.keys()
        tensors = inner if is_own else self.convert_published(state, weights)
        norm = {name for name in tensors.keys() ^ own.keys() if name.startswith("norm.")}
        tensors = {name: value for name, value in tensors.items() if name not in norm}
        tensors |= {name: value for name, value in own.items() if name in norm}
        fix = "Choose the model.encoder variant of the file, or a different init_from."
        check_config(self, config, self.published_settings, weights, fix)
        load_strictly(self, tensors, weights, fix)
        note = f" (without the final norm: {', '.join(sorted(norm))})" if norm else ""
        heads = origin_of_heads(config, self.published_settings)
        eps = getattr(self, "norm_eps", None)
        if eps is not None and config.get("layer_norm_eps", eps) != eps:
            heads += f"; norm_eps={eps} of this model, {config['layer_norm_eps']} in its config"
        return f"loaded {len(own)} encoder tensors from {weights}{note}{heads}"
