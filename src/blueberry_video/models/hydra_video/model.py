"""Hydra Video: a video backbone without attention, in linear time, that sees the past and all of the present frame.

Unusual about it: every layer is one state-space scan, bidirectional inside a frame and causal across frames (Hydra,
arXiv 2407.09941, carried over to video; see :mod:`.mixer`). So the features of a frame are
final when it comes: :meth:`HydraVideo.stream` takes a video frame by frame, with memory and time that do not grow, and
gives what the whole video would. Tokens know their place in the frame from a table, and their place in time from the
scan alone: there is no index of time that could run out, and videos may be longer than those it was trained on.
"""

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.hydra_video.mixer import HydraVideoBlock, HydraVideoMixer, Layout, MixerState
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.positions import sinusoid_table

State = tuple[MixerState, ...]  # one a layer


class HydraVideo(Encoder):
    """Encoder of video float (B, C, T, H, W), normalised with ImageNet mean and standard deviation -> tokens (B, N,
    D). T may be any multiple of ``tubelet_size``. A frame, to the layers, is what the patches of a tubelet make of it.

    Args:
        image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images: see
            :class:`~blueberry_video.models.encoder.Encoder`.
        depth: number of blocks.
        mlp_ratio: hidden over outer width of the MLPs; 0 for none.
        expand, head_dim, state_dim, num_groups, conv_size: see
            :class:`~blueberry_video.models.hydra_video.mixer.HydraVideoMixer`.
        scan_orders: orders, ``"h"`` and ``"w"``, in which the tokens of a frame are scanned; layers take them in turn.
        scan_blocks: blocks (rows, columns) of the frame that are scanned apart, ``None`` for the whole frame; layers
            take them in turn.
        memory_frames: frames of the longest memory that a head begins with: its step is one over their tokens, that of
            the shortest 0.1.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        final_norm: LayerNorm after the last block.

    Raises:
        ValueError: for sizes that the patches, heads or blocks do not divide; in ``forward`` for a video of another
            height, width or number of channels than built for, and for one that does not end with a tubelet.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 2.5,
        in_channels: int = 3,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: tuple[int, int, int] = (3, 3, 3),
        scan_orders: tuple[str, ...] = ("h", "w"),
        scan_blocks: tuple[tuple[int, int] | None, ...] = (None,),
        memory_frames: int = 100,
        drop_path: float = 0.0,
        final_norm: bool = True,
        images: bool = False,
    ):
        super().__init__(image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images)
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        _, h, w = self.grid(self.video_size)
        self.register_buffer("positions", sinusoid_table(h * w, embed_dim), persistent=False)
        if not scan_orders or not scan_blocks or memory_frames < 1:
            raise ValueError(
                f"scan_orders={scan_orders}, scan_blocks={scan_blocks}, memory_frames={memory_frames}: the first two "
                "need an entry at least, and the last must be 1 or more; the defaults are (h, w), (null,) and 100."
            )
        for rows, columns in (block for block in scan_blocks if block is not None):
            if min(rows, columns) < 1 or h % rows or w % columns:
                raise ValueError(
                    f"scan_blocks has {rows} x {columns}, which do not tile a frame of {h} x {w} tokens: choose "
                    "divisors of these, or null for the whole frame."
                )
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList()
        for layer, rate in enumerate(rates):
            order, block = scan_orders[layer % len(scan_orders)], scan_blocks[layer % len(scan_blocks)]
            rows, columns = block or (h, w)
            mixer = HydraVideoMixer(
                embed_dim,
                expand,
                head_dim,
                state_dim,
                num_groups,
                conv_size,
                None if block is None else (rows, columns),
                order,
                dt_range=(min(1 / (memory_frames * rows * columns), 0.1), 0.1),
            )
            self.blocks.append(HydraVideoBlock(mixer, embed_dim, mlp_ratio, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        self.blocks.apply(init_weights)

    def as_clip(self, video: Tensor) -> Tensor:
        """As :meth:`Encoder.as_clip`, but of any number of whole tubelets."""
        channels, _, *size = self.video_size
        frames, tubelet = video.shape[2], self.patch_size[0]
        if self.images and frames == 1:
            return super().as_clip(video)
        if [video.shape[1], *video.shape[3:]] != [channels, *size] or frames % tubelet or not frames:
            fix = "" if frames != 1 or self.images else "; single frames need model.encoder.images=true"
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])} but the encoder was built for C = {channels}, "
                f"(H, W) = {tuple(size)} and any T that is a multiple of tubelet_size={tubelet}: give the data and "
                f"model.encoder the same image_size, and cut the video after a whole tubelet{fix}."
            )
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        return self._encode(video, keep)[0]

    @torch.no_grad()
    def stream(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next tubelet of a video (or several), in constant memory and time however long the video is.

        Call it in evaluation mode: stochastic depth would drop other layers of every frame.

        Args:
            frame: (B, C, tubelet_size, H, W), normalised as the encoder wants it.
            state: what the call for the tubelet before gave; ``None`` for the first.

        Returns:
            The features (B, h * w, D), as :meth:`forward` gives them for the whole video, and the next state. No
            gradient goes through either.

        Raises:
            ValueError: for a frame of another size than built for, or a state of other frames.
        """
        return self._encode(frame, None, state, return_state=True)

    @staticmethod
    def _checked(keep: Tensor, batch: int) -> Tensor:
        if keep.ndim != 2 or len(keep) != batch or keep.dtype == torch.bool or keep.is_floating_point():
            raise ValueError(
                f"keep is a {keep.dtype} tensor of shape {tuple(keep.shape)}: it must hold the indices of the visible "
                f"tokens, (B, N_kept) whole numbers with B = {batch}."
            )
        keep = keep.long()
        looks = not keep.is_cuda and not torch.compiler.is_compiling()  # where looking at values costs no waiting
        if looks and (keep.sort(dim=1).values.diff(dim=1) == 0).any():
            raise ValueError("keep names a token twice: it must hold different indices in each row.")
        return keep

    def _encode(
        self, video: Tensor, keep: Tensor | None, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State]:
        """Tokens and, with ``return_state``, the state of every layer behind them."""
        clip = self.as_clip(video)
        if keep is not None:
            keep = self._checked(keep, len(video))
        layout = Layout(self.grid(clip.shape), keep)
        x = self.patch_embed(clip, keep)
        if keep is None:
            x = (x.unflatten(1, (-1, len(self.positions))) + self.positions).flatten(1, 2)
        else:
            x = x + self.positions[keep % len(self.positions)]
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"the state is of {len(state)} layers and the model has {len(self.blocks)}: pass its own.")
        before: list[MixerState | None] = [None] * len(self.blocks) if state is None else list(state)
        behind = []
        for block, past in zip(self.blocks, before, strict=True):
            x, present = block(x, layout, past, return_state)
            behind += [present] if return_state else []
        return self.norm(x), tuple(behind)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases.

    What keeps the values it is made with: the norms (1, 0); the convolutions of patches and mixers (uniform, as torch
    begins one); and the mixers' timescales: A = -1, steps log-uniform, D = 1.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
