"""Hydra Video: linear-time video backbone without attention, bidirectional within a frame and causal across frames.

Each layer is one state-space scan (Hydra, arXiv 2407.09941, extended to video; see :mod:`.mixer`). Since no token
depends on later frames, :meth:`HydraVideo.stream` encodes a video frame by frame with constant memory and time per
frame, and returns the features of the whole video. Positions within a frame come from a sinusoidal table, the position
in time from the scan alone: videos may be longer than in training.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.hydra_video.hydra import HydraMixer
from blueberry_video.models.hydra_video.mamba2 import Mamba2Mixer
from blueberry_video.models.hydra_video.mixer import HydraVideoBlock, HydraVideoMixer
from blueberry_video.models.hydra_video.state_space import Layout, MixerState
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.nn.positions import PositionTables, sinusoid_table
from blueberry_video.parallel.sequence import KEY, SequenceGroup, active_group

State = tuple[MixerState, ...]  # one per layer
MIXERS = {"hydra_video": HydraVideoMixer, "hydra": HydraMixer, "mamba2": Mamba2Mixer}


class HydraVideo(Encoder, PositionTables):
    """Encoder of video float (B, C, T, H, W), normalized with ImageNet mean and standard deviation -> tokens (B, N, D).

    T may be any multiple of ``tubelet_size``. A frame of tokens corresponds to one tubelet of the video.

    Args:
        image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images: See
            :class:`~blueberry_video.models.encoder.Encoder`.
        depth: Number of blocks.
        mlp_ratio: Ratio of the hidden width of the MLPs to the outer width; 0 for no MLPs.
        expand, head_dim, state_dim, num_groups: See
            :class:`~blueberry_video.models.hydra_video.state_space.StateSpaceMixer`.
        conv_size: See :class:`~blueberry_video.models.hydra_video.mixer.HydraVideoMixer`.
        scan_orders: Scan orders of the tokens of a frame, ``"h"`` or ``"w"``, cycled over layers.
        scan_blocks: Blocks (rows, columns) of a frame that are scanned separately, ``None`` for the whole frame; cycled
            over layers.
        memory_frames: Longest initial memory of a head, in frames: its step is 1 / (tokens of these frames), and the
            largest step is 0.1.
        drop_path: Stochastic depth rate of the last block; grows linearly from 0 at the first.
        final_norm: Applies a LayerNorm after the last block.
        mixer: Token mixer of the blocks: ``"hydra_video"``, or a baseline on the sequence of (visible) tokens in raster
            order, ``"hydra"`` (bidirectional over all tokens, no streaming) or ``"mamba2"`` (causal, also within a
            frame). The baselines have the convolutions (7 and 4 tokens), norms and initial decays of their papers;
            everything outside of the mixer is equal, as are its sizes.

    Raises:
        ValueError: For an unknown ``mixer``, ``conv_size``, ``scan_orders`` or ``scan_blocks`` set for a baseline, and
            sizes that the patches, heads or blocks do not divide; in ``forward`` for a video of a different height,
            width or number of channels, or with an incomplete last tubelet.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    splits_clips = True  # under sequence_parallel
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
        mixer: str = "hydra_video",
    ):
        super().__init__(image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images)
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        _, h, w = self.grid(self.video_size)
        self.register_tables()
        if mixer not in MIXERS:
            raise ValueError(f"mixer={mixer!r} is unknown: choose one of {', '.join(map(repr, MIXERS))}.")
        self.in_raster_order = mixer != "hydra_video"
        for key, value, default in (
            ("conv_size", conv_size, (3, 3, 3)),
            ("scan_orders", scan_orders, ("h", "w")),
            ("scan_blocks", scan_blocks, (None,)),
        ):
            if self.in_raster_order and tuple(value) != default:
                raise ValueError(
                    f"{key}={tuple(value)} has no effect with mixer={mixer!r}: leave it at {default}, or use "
                    "mixer='hydra_video'."
                )
        if not scan_orders or not scan_blocks or memory_frames < 1:
            raise ValueError(
                f"scan_orders={scan_orders} and scan_blocks={scan_blocks} must not be empty, and memory_frames="
                f"{memory_frames} must be at least 1; the defaults are (h, w), (null,) and 100."
            )
        for rows, columns in (block for block in scan_blocks if block is not None):
            if min(rows, columns) < 1 or h % rows or w % columns:
                raise ValueError(
                    f"scan_blocks has {rows} x {columns}, which do not tile a frame of {h} x {w} tokens: choose "
                    "divisors of these, or null for the whole frame."
                )
        sizes = (embed_dim, expand, head_dim, state_dim, num_groups)
        self.blocks = nn.ModuleList()
        for layer, rate in enumerate(torch.linspace(0, drop_path, depth, device="cpu").tolist()):
            order, block = scan_orders[layer % len(scan_orders)], scan_blocks[layer % len(scan_blocks)]
            rows, columns = block or (h, w)
            options: dict[str, Any] = {"dt_range": (min(1 / (memory_frames * rows * columns), 0.1), 0.1)}
            if mixer == "hydra_video":
                options |= {"conv_size": conv_size, "block": block and (rows, columns), "order": order}
            self.blocks.append(HydraVideoBlock(MIXERS[mixer](*sizes, **options), embed_dim, mlp_ratio, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        self.blocks.apply(init_weights)

    def as_clip(self, video: Tensor) -> Tensor:
        """Same as :meth:`Encoder.as_clip`, for any number of whole tubelets."""
        channels, _, *size = self.video_size
        frames, tubelet = video.shape[2], self.patch_size[0]
        if self.images and frames == 1:
            return super().as_clip(video)
        if [video.shape[1], *video.shape[3:]] != [channels, *size] or frames % tubelet or not frames:
            fix = "" if frames != 1 or self.images else "; single frames need model.encoder.images=true"
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])} but the encoder was built for C = {channels}, "
                f"(H, W) = {tuple(size)} and any T that is a multiple of tubelet_size={tubelet}: set the same "
                f"image_size for the data and model.encoder, and end the video with a whole tubelet{fix}."
            )
        return video

    def tables(self) -> dict[str, Tensor]:
        _, h, w = self.grid(self.video_size)
        return {"positions": sinusoid_table(h * w, self.embed_dim)}

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D).

        Under :func:`~blueberry_video.parallel.sequence.sequence_parallel`, the frames are split over the group. Each
        process must have the same number of visible tokens in its frames, as with tube masking.
        """
        return self._encode(video, keep)[0]

    @torch.no_grad()
    def stream(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encodes the next tubelet of one or several videos, in constant memory and time.

        Call it in evaluation mode: stochastic depth would drop different layers in each frame.

        Args:
            frame: (B, C, tubelet_size, H, W), normalized as in ``forward``.
            state: State returned for the preceding tubelet; ``None`` for the first.

        Returns:
            Features (B, h * w, D), equal to those of :meth:`forward` on the whole video, and the next state, both
            without gradients.

        Raises:
            ValueError: For a frame or state of a different size, and with ``mixer="hydra"``, which is not causal.
        """
        return self._encode(frame, None, state, return_state=True)

    @staticmethod
    def _checked(keep: Tensor, batch: int) -> Tensor:
        if keep.ndim != 2 or len(keep) != batch or keep.dtype == torch.bool or keep.is_floating_point():
            raise ValueError(
                f"keep is a {keep.dtype} tensor of shape {tuple(keep.shape)}: it must contain the indices of the "
                f"visible tokens, integers of shape (B, N_kept) with B = {batch}."
            )
        keep = keep.long()
        readable = not keep.is_cuda and not torch.compiler.is_compiling()  # without synchronization
        if readable and (keep.sort(dim=1).values.diff(dim=1) == 0).any():
            raise ValueError("keep contains duplicate indices: the indices of each row must be distinct.")
        return keep

    def _split(
        self, group: SequenceGroup, clip: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the frames of this process, its visible tokens in them, and the ranks of the visible tokens of all
        processes, one process after the other."""
        t, h, w = self.grid(clip.shape)
        tokens = group.part(t, "the frames of tokens", "data.num_frames, a multiple of tubelet_size") * h * w
        clip = group.own(clip, dim=2)
        if keep is None:
            return clip, None, None
        owner = keep // tokens
        counts = torch.stack([(owner == rank).sum(1) for rank in range(group.size)])
        if (counts != counts[0, 0]).any():
            raise ValueError(
                f"keep has from {int(counts.min())} to {int(counts.max())} visible tokens in the frames of a process: "
                f"{KEY}={group.size} requires equal numbers. Use a masking with the same number of visible tokens in "
                "every frame, such as TubeMasking."
            )
        order = owner.argsort(dim=1, stable=True)
        own = group.own(keep.gather(1, order)) - group.rank * tokens
        return clip, own, order.argsort(dim=1)

    def _encode(
        self, video: Tensor, keep: Tensor | None, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State]:
        """Returns the tokens and, with ``return_state``, the state of every layer after them."""
        clip = self.as_clip(video)
        ranks: Tensor | None = None
        if keep is not None:
            keep = self._checked(keep, len(video))
            if self.in_raster_order:
                keep, order = keep.sort(dim=1)
                ranks = order.argsort(dim=1)
        group = active_group()
        if group is not None:
            clip, keep, of_split = self._split(group, clip, keep)
            ranks = of_split if ranks is None else ranks  # in raster order, those of all processes are too
        layout = Layout(self.grid(clip.shape), keep, group)
        x = self.patch_embed(clip, keep)
        if keep is None:
            x = (x.unflatten(1, (-1, len(self.positions))) + self.positions).flatten(1, 2)
        else:
            x = x + self.positions[keep % len(self.positions)]
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"state has {len(state)} layers, but the model has {len(self.blocks)}: pass a state of this model."
            )
        states = []
        for layer, block in enumerate(self.blocks):
            x, new = block(x, layout, None if state is None else state[layer], return_state)
            states += [new] if return_state else []
        x = self.norm(x)
        x = x if group is None else group.gather(x)
        return x if ranks is None else gather_tokens(x, ranks), tuple(states)


def init_weights(module: nn.Module) -> None:
    """Initializes linear layers: Xavier-uniform matrices, zero biases.

    Unchanged are the norms (1, 0), the convolutions of patches and mixers (uniform, torch's default), and the time
    scales of the mixers: A, the steps and D.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
