"""Base class of video encoders."""

import math
from pathlib import Path

from torch import Tensor, nn

from blueberry_video.weights.files import read_weights
from blueberry_video.weights.load import load_strictly


class Encoder(nn.Module):
    """Turns a video into tokens: ``encoder(video, keep=None) -> (B, N or N_kept, D)``.

    A subclass writes ``forward(video, keep=None)``: ``video`` float (B, C, T, H, W), ``keep`` indices (B, N_kept) of
    the tokens to look at, in (t, h, w) raster order; all of them if ``None``.

    Args:
        image_size: height and width in pixels; a multiple of ``patch_size``.
        num_frames: frames a clip; a multiple of ``tubelet_size``.
        patch_size: height and width of a patch in pixels.
        tubelet_size: frames a patch spans.
        embed_dim: width D of the tokens.
        in_channels: colour channels C.
        images: take single frames (T = 1) as well as clips: each is repeated over a tubelet, so that it becomes 1 x h x
            w tokens with the positions of a clip's first ones (OmniMAE, arXiv 2206.08356).

    Attributes:
        embed_dim: width of the tokens.
        patch_size: pixels a token stands for, (t, h, w).
        video_size: the shape (C, T, H, W) it was built for.
        images: whether it takes single frames, too.
        levels: depths that lie side by side in its tokens, each ``embed_dim / levels`` wide.

    Raises:
        ValueError: for sizes that the patches do not divide.
    """

    levels: int = 1

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
                raise ValueError(f"{key}={size} is not a multiple of {by}={patch}: the nearest that is, is {nearest}.")
        self.embed_dim, self.images = embed_dim, images
        self.patch_size: tuple[int, int, int] = (tubelet_size, patch_size, patch_size)
        self.video_size: tuple[int, int, int, int] = (in_channels, num_frames, image_size, image_size)

    def grid(self, video_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape (…, T, H, W) of a video -> number of tokens along (t, h, w); of a single frame (1, h, w)."""
        t, h, w = (size // patch for size, patch in zip(video_shape[-3:], self.patch_size, strict=True))
        return 1 if video_shape[-3] == 1 else t, h, w

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole clip of the size this encoder was built for."""
        return math.prod(self.grid(self.video_size))

    def as_clip(self, video: Tensor) -> Tensor:
        """The video float (B, C, T, H, W) as patches are cut from it: a single frame repeated over a tubelet.

        Raises:
            ValueError: for another (C, T, H, W) than this encoder was built for, or for a single frame if it takes no
                images.
        """
        channels, _, *size = self.video_size
        if self.images and tuple(video.shape[1:]) == (channels, 1, *size):
            return video.expand(-1, -1, self.patch_size[0], -1, -1)
        if tuple(video.shape[1:]) != self.video_size:
            single = f" or, for images, (C, 1, H, W) = {(channels, 1, *size)}" if self.images else ""
            fix = "" if self.images or video.shape[2] != 1 else "; single frames need model.encoder.images=true"
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])} but the encoder was built for "
                f"{self.video_size}{single}: give the data and model.encoder the same num_frames and image_size{fix}."
            )
        return video

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        """Converts a published state dict, in any layout of this architecture, to the names of this encoder.

        Args:
            state: tensors by name.
            source: origin of the weights, for error messages.

        Raises:
            ValueError: the state dict is of another architecture.
        """
        return state

    def load_published(self, source: str | Path) -> str:
        """Loads published weights of this architecture, or the encoder in a checkpoint of a run.

        A final norm that only the file or only the encoder has is ignored: fine-tuning starts from a pre-trained
        encoder without its final norm.

        Args:
            source: a weight file, see :func:`~blueberry_video.weights.files.read_weights`.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: tensors are missing, unexpected or of another shape; the message names them.
        """
        state, own = read_weights(source), self.state_dict()
        inner = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
        is_own = {name for name in own if not name.startswith("norm.")} <= inner.keys()
        weights = inner if is_own else self.convert_published(state, source)
        norm = {name for name in weights.keys() ^ own.keys() if name.startswith("norm.")}
        weights = {name: value for name, value in weights.items() if name not in norm}
        weights |= {name: value for name, value in own.items() if name in norm}
        fix = "Choose the model.encoder variant that the file was made with, or another init_from."
        load_strictly(self, weights, source, fix)
        note = f" (without the final norm: {', '.join(sorted(norm))})" if norm else ""
        return f"loaded {len(own)} encoder tensors from {source}{note}"
