"""Hydra Video generator: predicts the tokens of a video frame by frame, from a state of constant size.

The layers are Hydra Video mixers, optionally some with attention to the last frames (as in Long-Context State-Space
Video World Models, arXiv 2505.20171), with adaLN modulation by class, caption and action. The model is trained by
complete teacher forcing (arXiv 2501.12389): every masked frame is predicted from the clean frames before it.

Shapes: B batch, (t, h, w) grid of tokens, S = h w tokens of a frame, D width, V codes of the tokenizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from blueberry_video.models.hydra_video.chunks import Chunks, nearest_divisor
from blueberry_video.models.hydra_video.frame_attention import FrameAttention
from blueberry_video.models.hydra_video.mixer import HydraVideoMixer, ReturnState
from blueberry_video.models.hydra_video.model import init_weights
from blueberry_video.models.hydra_video.state_space import Layout
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.positions import PositionTables, sinusoid_table
from blueberry_video.nn.timestep_conditioning import gated, modulate
from blueberry_video.weights.files import read_weights, resolve
from blueberry_video.weights.load import load_strictly

States = tuple[Any, ...]  # MixerState or AttentionState of every layer


class Conditioning(NamedTuple):
    """Conditioning of a batch of videos; conditions that are ``None`` are replaced by their null embeddings.

    Attributes:
        labels: Classes (B,) long by label; a label may be missing.
        text: B captions, or pooled text embeddings (B, P).
        actions: (B, n) long, or (B, n, k) with k = ``actions_per_frame``: those that lead to each frame. n is the
            number of frames, or one less for a video that begins with its first frame, to which no action leads.
        drop: (B,) bool: clips without conditioning, for classifier-free guidance.
    """

    labels: Mapping[str, Tensor] | None = None
    text: Sequence[str] | Tensor | None = None
    actions: Tensor | None = None
    drop: Tensor | None = None

    def first(self, count: int) -> "Conditioning":
        """Returns the conditioning of the first clips."""
        labels = None if self.labels is None else {label: value[:count] for label, value in self.labels.items()}
        actions, drop = (None if part is None else part[:count] for part in (self.actions, self.drop))
        return Conditioning(labels, None if self.text is None else self.text[:count], actions, drop)


class FrameCache(NamedTuple):
    """Cache of one frame: one per layer, and the modulation of every layer by the conditioning of the frame."""

    layers: tuple[Any, ...]  # ScanCache or AttentionCache
    modulations: tuple[tuple[Tensor, ...], ...]
    positions: Tensor  # (chunks, q)


class HydraVideoGenerator(PositionTables):
    """Predicts the tokens of each frame from the frame with masked tokens and the clean frames before it.

    Tokens are codes 0 to ``vocabulary`` - 1; the id ``vocabulary`` is the mask. Token positions within a frame have a
    sinusoidal table; time comes from the scan alone, so videos may be longer than in training.

    Args:
        vocabulary: Number of codes V of the tokenizer.
        grid: Rows and columns (h, w) of the tokens of a frame.
        embed_dim: Width D.
        depth: Number of layers.
        mlp_ratio: Ratio of the hidden width of the MLPs to ``embed_dim``.
        expand, head_dim, state_dim, num_groups: See
            :class:`~blueberry_video.models.hydra_video.state_space.StateSpaceMixer`; ``head_dim`` is also that of
            attention layers.
        conv_size: Frames, rows and columns of the convolution of the mixers. With more than one row or column, tokens
            to the right of a chunk depend on its tokens, which the cached states ignore: generation in mode
            ``"cached"`` is then approximate within a mixer; with (kt, 1, 1) it is exact.
        scan_blocks: Blocks (rows, columns) of a frame that are scanned separately, ``None`` for the whole frame; cycled
            over layers.
        attention_layers: Indices of layers that are attention to the last frames instead.
        attention_frames: Frames of their window, the own frame included.
        mixer: ``"hydra_video"``, or ``"attention"`` for attention in all layers, a baseline. Attention layers have a
            wider MLP, such that the number of parameters of a layer is equal up to ``embed_dim`` + 1.
        memory_frames: Longest initial memory of a head, in frames: its step is 1 / (tokens of these frames).
        num_classes: Number of classes by label; ``None`` (also for a single label) for no such conditioning.
        text: Text encoder with ``pooled_dim`` above 0 that is called with captions, trained unless it is ``frozen``;
            ``None`` for no captions, or precomputed embeddings.
        text_dim: Width of precomputed pooled text embeddings; 0 for none, or that of ``text``.
        num_actions: Number of actions; 0 for none.
        actions_per_frame: Actions that lead to one frame of tokens, the temporal factor of the tokenizer.

    Raises:
        ValueError: For sizes out of range or that do not divide; in use, for ids, classes or actions out of range (on
            the CPU; on a GPU this would synchronize), frames of a different size, actions of a different number, or
            states of a different batch.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    positions: Tensor

    def __init__(
        self,
        vocabulary: int,
        grid: tuple[int, int],
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 2.5,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 64,
        num_groups: int = 1,
        conv_size: tuple[int, int, int] = (3, 1, 1),
        scan_blocks: tuple[tuple[int, int] | None, ...] = (None,),
        attention_layers: tuple[int, ...] = (),
        attention_frames: int = 4,
        mixer: str = "hydra_video",
        memory_frames: int = 100,
        num_classes: Mapping[str, int | None] | None = None,
        text: nn.Module | None = None,
        text_dim: int = 0,
        num_actions: int = 0,
        actions_per_frame: int = 1,
    ):
        super().__init__()
        h, w = grid
        self.vocabulary, self.mask_id, self.grid, self.embed_dim = vocabulary, vocabulary, (h, w), embed_dim
        self.num_actions, self.actions_per_frame = num_actions, actions_per_frame
        for key, value, least in (
            ("vocabulary", vocabulary, 2),
            ("grid rows", h, 1),
            ("grid columns", w, 1),
            ("depth", depth, 1),
            ("memory_frames", memory_frames, 1),
            ("num_actions", num_actions, 0),
            ("actions_per_frame", actions_per_frame, 1),
            ("text_dim", text_dim, 0),
        ):
            if value < least:
                raise ValueError(f"{key}={value} of the generator must be at least {least}.")
        if mixer not in ("hydra_video", "attention"):
            raise ValueError(f"mixer={mixer!r} is unknown: choose 'hydra_video' or 'attention'.")
        if not mlp_ratio > 0 or not scan_blocks:
            raise ValueError(f"mlp_ratio={mlp_ratio} must be above 0, and scan_blocks={scan_blocks} not empty.")
        if outside := [layer for layer in attention_layers if not 0 <= layer < depth]:
            raise ValueError(f"attention_layers has {outside[0]}: the {depth} layers are 0 to {depth - 1}.")
        self._build_conditions(num_classes or {}, text, text_dim)
        self.tokens = nn.Embedding(vocabulary + 1, embed_dim)
        self.register_tables()
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            block = _checked_block(scan_blocks[layer % len(scan_blocks)], self.grid)
            rows, columns = block or self.grid
            step = min(1 / (memory_frames * rows * columns), 0.1)

            def hydra(block: Any = block, step: float = step) -> HydraVideoMixer:
                sizes = (embed_dim, expand, head_dim, state_dim, num_groups)
                return HydraVideoMixer(*sizes, conv_size=conv_size, dt_range=(step, 0.1), block=block)

            hidden = round(embed_dim * mlp_ratio)
            if mixer == "hydra_video" and layer not in attention_layers:
                chosen: nn.Module = hydra()
            else:
                chosen = FrameAttention(embed_dim, head_dim, self.grid, attention_frames)
                with torch.device("meta"):
                    more = _num_parameters(hydra()) - _num_parameters(chosen)
                hidden = max(1, hidden + round(more / (2 * embed_dim + 1)))
            self.blocks.append(GeneratorBlock(chosen, embed_dim, hidden))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, vocabulary)
        self.blocks.apply(init_weights)
        init_weights(self.head)
        for each in self.layers():
            each.init_modulation()

    def _build_conditions(self, num_classes: Mapping[str, int | None], text: nn.Module | None, text_dim: int) -> None:
        dim = self.embed_dim
        counts = {label: count for label, count in num_classes.items() if count is not None}
        for label, count in counts.items():
            if count < 1:
                raise ValueError(f"num_classes.{label}={count} must be at least 1, or null for no conditioning.")
        if text is not None:
            pooled = int(getattr(text, "pooled_dim", 0))
            if pooled < 1 or text_dim not in (0, pooled):
                raise ValueError(
                    f"text.pooled_dim={pooled} of the text encoder must be at least 1 and equal to text_dim={text_dim} "
                    "unless that is 0: captions condition the generator as one pooled vector."
                )
            text_dim = pooled
            if getattr(text, "frozen", False):
                text.requires_grad_(False)
        self.text, self.text_dim = text, text_dim
        self.base = nn.Parameter(torch.zeros(dim))
        # the last class of a label is the null embedding; after the actions: no action leads to the frame, null
        self.labels = nn.ModuleDict({label: nn.Embedding(count + 1, dim) for label, count in counts.items()})
        self.text_proj = nn.Linear(text_dim, dim) if text_dim else None
        self.null_text = nn.Parameter(torch.randn(dim)) if text_dim else None
        size = self.actions_per_frame * (self.num_actions + 2)
        self.actions = nn.Embedding(size, dim) if self.num_actions else None
        tables = [*(f"labels.{label}.weight" for label in counts), *(["actions.weight"] if self.num_actions else [])]
        self.no_weight_decay = ("tokens.weight", *tables)

    def layers(self) -> "list[GeneratorBlock]":
        """Returns the blocks."""
        return list(cast(Iterable[GeneratorBlock], self.blocks))

    def tables(self) -> dict[str, Tensor]:
        return {"positions": sinusoid_table(self.grid[0] * self.grid[1], self.embed_dim)}

    # ---- conditioning ------------------------------------------------------------------------------------------------

    def embed_clip(self, conditioning: Conditioning | None, batch: int) -> Tensor:
        """Returns the sum (B, D) of the embeddings of classes and caption.

        Raises:
            ValueError: For an unknown label or class, captions without text encoder, or a different batch size.
        """
        labels, text, _, drop = conditioning or Conditioning()
        labels = labels or {}
        if unknown := sorted(set(labels) - set(self.labels)):
            known = ", ".join(self.labels) or "none"
            raise ValueError(f"labels has {unknown[0]!r}, but num_classes of the generator has {known}: remove it.")
        total = self.base.expand(batch, -1)
        drop = None if drop is None else _sized("drop", drop, batch)
        for label, table in self.labels.items():
            null = cast(nn.Embedding, table).num_embeddings - 1
            value = labels.get(label)
            index = torch.full((batch,), null, device=total.device) if value is None else _sized(label, value, batch)
            _check_range(f"labels.{label}", index, null if value is not None else null + 1)
            total = total + table(index if drop is None else index.masked_fill(drop, null))
        if self.text_proj is None:
            if text is not None:
                raise ValueError("the generator has text=null and text_dim=0: it is not conditioned on captions.")
            return total
        assert self.null_text is not None
        if text is None:
            return total + self.null_text
        embedded = self.text_proj(_sized("text", self._pooled(text), batch))
        return total + (embedded if drop is None else torch.where(drop[:, None], self.null_text, embedded))

    def embed_actions(
        self, actions: Tensor | None, batch: int, frames: int, first: bool, drop: Tensor | None = None
    ) -> Tensor | None:
        """Returns the sum (B, frames, D) of the embeddings of the actions that lead to each frame.

        Args:
            actions: (B, n) or (B, n, k), see :class:`Conditioning`; ``None`` for null actions.
            batch, frames: B, and the number of frames.
            first: The first frame is the first of its video: no action leads to it, n = frames - 1.
            drop: (B,) bool, clips with null actions.

        Returns:
            ``None`` for a model without actions.

        Raises:
            ValueError: For actions of a model without, of a different number, or out of range.
        """
        count, per_frame = self.num_actions, self.actions_per_frame
        if self.actions is None:
            if actions is not None:
                raise ValueError("the generator has num_actions=0: it is not conditioned on actions.")
            return None
        size = (batch, frames - first, per_frame)
        if actions is None:
            actions = torch.full(size, count + 1, device=self.base.device)
        else:
            expected = (batch, frames - first) if actions.ndim == 2 and per_frame == 1 else size
            if tuple(actions.shape) != expected:
                raise ValueError(
                    f"actions has shape {tuple(actions.shape)}, but it must be (B, n, actions_per_frame) = {size}"
                    f"{f', or {size[:2]}' if per_frame == 1 else ''}: one for each of the {frames} frames"
                    f"{' but the first of the video' if first else ''}."
                )
            actions = actions.reshape(size)
            _check_range("actions", actions, count)
            if drop is not None:
                actions = actions.masked_fill(_sized("drop", drop, batch)[:, None, None], count + 1)
        if first:
            actions = torch.cat([actions.new_full((batch, 1, per_frame), count), actions], dim=1)
        offsets = torch.arange(per_frame, device=actions.device) * (count + 2)
        return self.actions(actions + offsets).sum(2)

    def condition(self, conditioning: Conditioning | None, batch: int, frames: int, first: bool = True) -> Tensor:
        """Returns the conditioning vectors (B, K, D), K = frames for models with actions, else 1."""
        conditioning = conditioning or Conditioning()
        clip = self.embed_clip(conditioning, batch)[:, None]
        actions = self.embed_actions(conditioning.actions, batch, frames, first, conditioning.drop)
        return clip if actions is None else clip + actions

    def _pooled(self, text: Sequence[str] | Tensor) -> Tensor:
        if isinstance(text, Tensor):
            return text.to(self.base)
        if self.text is None:
            raise ValueError("the generator has text=null and received captions: pass pooled text embeddings (B, P).")
        pooled = self.text(list(text)).pooled
        return pooled.detach() if getattr(self.text, "frozen", False) else pooled

    # ---- parallel evaluation -----------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, conditioning: Conditioning | None = None, states: States | None = None) -> Tensor:
        """Predicts the tokens of frames that follow each other.

        Args:
            ids: (B, t, h, w) long, in [0, vocabulary].
            conditioning: Conditioning of these frames.
            states: States after the preceding frames, see :meth:`commit`; ``None`` before the first.

        Returns:
            Logits (B, t, h, w, V).
        """
        vectors = self.condition(conditioning, len(ids), ids.shape[1], states is None)
        return self.evaluate(ids, vectors, states)[0]

    def evaluate(
        self, ids: Tensor, vectors: Tensor, states: States | None = None, return_states: ReturnState = False
    ) -> tuple[Tensor, States]:
        """:meth:`forward` with the vectors of :meth:`condition`; also returns the states, see the mixer."""
        x, states = self._features(self._checked(ids), vectors, states, return_states)
        return self.head(self.norm(x)).unflatten(1, ids.shape[1:]), states

    def teacher_forced(
        self, clean: Tensor, corrupted: Tensor, conditioning: Conditioning | None = None, states: States | None = None
    ) -> Tensor:
        """Predicts each corrupted frame from the clean frames before it, in two passes.

        The first pass computes the states of the clean video, the second evaluates all corrupted frames as one batch
        of B t frames. Gradients flow through both.

        Args:
            clean: (B, t, h, w) long, in [0, vocabulary).
            corrupted: The same with tokens that are masked (id ``vocabulary``) or replaced.
            conditioning, states: See :meth:`forward`.

        Returns:
            Logits (B, t, h, w, V).
        """
        if clean.shape != corrupted.shape:
            raise ValueError(f"corrupted has shape {tuple(corrupted.shape)}, but clean has {tuple(clean.shape)}.")
        (batch, frames), first = clean.shape[:2], states is None
        vectors = self.condition(conditioning, batch, frames, first)
        _, before = self._features(self._checked(clean, masks=False), vectors, states, "before_frames")
        folded = self._checked(corrupted).flatten(0, 1)[:, None]
        logits, _ = self.evaluate(folded, vectors.expand(-1, frames, -1).flatten(0, 1)[:, None], before)
        return logits[:, 0].unflatten(0, (batch, frames))

    def load_published(self, weights: str | Path) -> str:
        """Loads a checkpoint of a run of this model strictly; returns a message that names it."""
        load_strictly(
            self, read_weights(resolve(weights)), weights, "Choose the model settings of the run that wrote them."
        )
        return f"loaded {len(self.state_dict())} tensors from {weights}"

    def initial_states(self, batch: int) -> States:
        """States before the first frame of B videos: a video that continues from these has forgotten its past."""
        return tuple(block.mixer.initial_state(batch, self.grid) for block in self.layers())

    # ---- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def commit(self, ids: Tensor, vectors: Tensor, states: States | None = None) -> States:
        """Returns the states after final frames (B, t, h, w), of constant size.

        Args:
            ids: Final tokens in [0, vocabulary).
            vectors: Of :meth:`condition`, (B, 1 or t, D).
            states: States after the preceding frames; ``None`` before the first.
        """
        return self._features(self._checked(ids, masks=False), vectors, states, True)[1]

    @torch.no_grad()
    def cache_frame(
        self, ids: Tensor, vectors: Tensor, chunks: Chunks, states: States | None = None
    ) -> tuple[Tensor, FrameCache]:
        """Evaluates one frame in parallel, and caches the states that :meth:`update_chunk` reads.

        Args:
            ids: Tokens (B, S) of the frame in raster order, in [0, vocabulary].
            vectors: Of :meth:`condition`, (B, 1, D).
            chunks: Partition of the frame, which must fit ``scan_blocks``.
            states: States after the preceding frames; ``None`` before the first.

        Returns:
            Logits (B, S, V), and the cache.
        """
        if chunks.frame != self.grid:
            raise ValueError(f"chunks are of frames of {chunks.frame}, but the generator has grid={self.grid}.")
        x, layers, modulations = self._embed(self._checked(ids.unflatten(1, (1, *self.grid)))), [], []
        for layer, block in enumerate(self.layers()):
            modulations.append(block.modulation_of(vectors))
            x, cache = block.cache_frame(x, modulations[-1], chunks, None if states is None else states[layer])
            layers.append(cache)
        cache = FrameCache(tuple(layers), tuple(modulations), chunks.positions().to(ids.device))
        return self.head(self.norm(x)), cache

    @torch.no_grad()
    def update_chunk(self, ids: Tensor, index: int, cache: FrameCache, advance: bool = True) -> Tensor:
        """Evaluates one chunk of a cached frame, see the mixer.

        Layers above the first read cached states to the right that were computed from the old tokens: the output is
        that of a full evaluation only if tokens do not change.

        Args:
            ids: Tokens (B, q) of the chunk, in [0, vocabulary].
            index: Index of the chunk.
            cache: Of :meth:`cache_frame`, updated in place.
            advance: Advances the running states over the chunk.

        Returns:
            Logits (B, q, V).
        """
        self._check_ids(ids, masks=True)
        x = self.tokens(ids) + self.positions[cache.positions[index]]
        for block, modulation, layer in zip(self.layers(), cache.modulations, cache.layers):
            x = block.update_chunk(x, modulation, index, layer, advance)
        return self.head(self.norm(x))

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _embed(self, ids: Tensor) -> Tensor:
        """(B, t, h, w) -> (B, t S, D)."""
        return (self.tokens(ids).flatten(2, 3) + self.positions).flatten(1, 2)

    def _features(
        self, ids: Tensor, vectors: Tensor, states: States | None, return_states: ReturnState
    ) -> tuple[Tensor, States]:
        if states is not None and len(states) != len(self.blocks):
            raise ValueError(f"states has {len(states)} layers, but the generator has {len(self.blocks)}.")
        x, layout, returned = self._embed(ids), Layout((ids.shape[1], *self.grid)), []
        for layer, block in enumerate(self.layers()):
            x, state = block(x, vectors, layout, None if states is None else states[layer], return_states)
            returned.append(state)
        return x, tuple(returned) if return_states else ()

    def _checked(self, ids: Tensor, masks: bool = True) -> Tensor:
        """Returns ids (B, t, h, w) after checking grid, type and range."""
        if ids.ndim != 4 or tuple(ids.shape[2:]) != self.grid or 0 in ids.shape:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}, but grid={self.grid} of the generator requires (B, t, h, w) with "
                f"(h, w) = {self.grid}: encode videos of the height and width of training, or change grid."
            )
        self._check_ids(ids, masks)
        return ids

    def _check_ids(self, ids: Tensor, masks: bool) -> None:
        _check_range("ids", ids, self.vocabulary + masks)


class GeneratorBlock(nn.Module):
    """Pre-norm residual block with adaLN-zero modulation (arXiv 2212.09748): a token mixer and an MLP.

    Args:
        mixer: Hydra Video mixer or attention over frames.
        dim: Width D.
        hidden: Hidden width of the MLP.
    """

    def __init__(self, mixer: nn.Module, dim: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mixer: Any = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, hidden)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def init_modulation(self) -> None:
        """Initializes shifts, scales and gates at 0: the block is the identity."""
        linear = cast(nn.Linear, self.modulation[1])
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    def modulation_of(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of mixer and MLP, each (B, K, D), of conditioning vectors (B, K, D)."""
        return self.modulation(vectors).chunk(6, dim=-1)

    def forward(
        self, x: Tensor, vectors: Tensor, layout: Layout, state: Any, return_state: ReturnState
    ) -> tuple[Tensor, Any]:
        """Tokens (B, t S, D) and vectors (B, K, D) -> tokens and the state of the mixer."""
        modulation = self.modulation_of(vectors)
        mixed, state = self.mixer(self._input(x, modulation), layout, state, return_state)
        return self._residual(x, mixed, modulation), state

    def cache_frame(self, x: Tensor, modulation: tuple[Tensor, ...], chunks: Chunks, state: Any) -> tuple[Tensor, Any]:
        """Evaluates one frame (B, S, D), and returns the cache of the mixer."""
        mixed, cache = self.mixer.cache_frame(self._input(x, modulation), chunks, state)
        return self._residual(x, mixed, modulation), cache

    def update_chunk(
        self, x: Tensor, modulation: tuple[Tensor, ...], index: int, cache: Any, advance: bool = True
    ) -> Tensor:
        """Evaluates one chunk (B, q, D) of a cached frame."""
        mixed = self.mixer.update_chunk(self._input(x, modulation), index, cache, advance)
        return self._residual(x, mixed, modulation)

    def _input(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        return modulate(self.norm1(x), *modulation[:2])

    def _residual(self, x: Tensor, mixed: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, shift, scale, mlp_gate = modulation
        x = gated(x, gate, mixed)
        return gated(x, mlp_gate, self.mlp(modulate(self.norm2(x), shift, scale)))


def _checked_block(block: tuple[int, int] | None, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Returns a block of ``scan_blocks`` as a tuple; raises ``ValueError`` unless it tiles a frame."""
    if block is None:
        return None
    if len(block) != 2 or min(block) < 1 or any(total % part for total, part in zip(grid, block)):
        near = tuple(nearest_divisor(total, part) for total, part in zip(grid, block))
        raise ValueError(
            f"scan_blocks has {tuple(block)}, which does not tile a frame of {grid[0]} x {grid[1]} tokens: use {near}, "
            "or null for the whole frame."
        )
    return block[0], block[1]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sized(name: str, value: Tensor, batch: int) -> Tensor:
    if len(value) != batch:
        raise ValueError(f"{name} has {len(value)} entries for {batch} clips: pass one per clip.")
    return value


def _check_range(name: str, index: Tensor, size: int) -> None:
    """Checks that integers are in [0, size); values only on the CPU, because reading them synchronizes with a GPU."""
    if index.dtype == torch.bool or index.is_floating_point():
        raise ValueError(f"{name} is a {index.dtype} tensor: it must contain integers from 0 to {size - 1}.")
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (outside := (index < 0) | (index >= size)).any():
        raise ValueError(f"{name} has {int(index[outside][0])}: it must be from 0 to {size - 1}.")
