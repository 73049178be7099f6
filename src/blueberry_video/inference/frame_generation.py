"""Generation of videos frame by frame with the generator of :mod:`blueberry_video.models.hydra_video.generator`.

Each frame starts as mask tokens and is decoded in rounds from the states after the committed frames; then its final
tokens are committed. Memory and time per frame do not depend on the number of frames.

- ``"cached"``: a round samples the masked tokens in parallel, then evaluates the frame again in chunks from left to
  right: each chunk reads the updated forward state to its left and the cached backward state to its right, and its
  tokens are sampled again. Between rounds, the tokens of the least confidence are masked.
- ``"parallel"``: the rounds of MaskGIT (arXiv 2202.04200), without chunks.
- ``"autoregressive"``: chunk after chunk, from left to right; all tokens to the right of a chunk are masked.

Shapes: B clips, (h, w) grid, S = h w tokens of a frame, V codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blueberry_video.models.hydra_video.chunks import Chunks
from blueberry_video.models.hydra_video.generator import Conditioning, FrameCache, HydraVideoGenerator, States
from blueberry_video.nn.noise import clip_generators

Generators = torch.Generator | Sequence[torch.Generator] | Sequence[int] | None


@dataclass(frozen=True)
class FrameDecoding:
    """Settings of the decoding of a frame.

    Args:
        rounds: Rounds M of a frame; of each chunk in mode ``"autoregressive"``.
        granularity: Tokens of a chunk: ``"token"``, ``"row"``, ``"frame"``, a number of rows, or (rows, columns). Not
            used in mode ``"parallel"``.
        temperature: Of sampling; 0 for the most probable code.
        schedule: Share of masked tokens after round m: cos(π m / 2 M) or 1 - m / M.
        guidance: Scale s of classifier-free guidance, unconditional + s (conditional - unconditional), which doubles
            the evaluations; 1 for none.
        mode: ``"cached"``, ``"parallel"`` or ``"autoregressive"``, see the module.
        advance: Tokens that advance the state over a chunk in mode ``"cached"``: ``"estimate"``, the tokens before they
            are sampled again, in the same evaluation; ``"sample"``, the new tokens, in one more evaluation.
        mask_updates: Evaluates chunks with the masked tokens of the round still masked, and samples these only;
            requires ``advance="sample"``.
        choice_temperature: Scale of the Gumbel noise on the log-confidence, reduced linearly to 0 over the rounds, as
            in MaskGIT; 0 for none.

    Raises:
        ValueError: For values out of range.
    """

    rounds: int = 4
    granularity: str | int | tuple[int, int] = "row"
    temperature: float = 1.0
    schedule: Literal["cosine", "linear"] = "cosine"
    guidance: float = 1.0
    mode: Literal["cached", "parallel", "autoregressive"] = "cached"
    advance: Literal["estimate", "sample"] = "estimate"
    mask_updates: bool = False
    choice_temperature: float = 0.0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "schedule": ("cosine", "linear"),
            "mode": ("cached", "parallel", "autoregressive"),
            "advance": ("estimate", "sample"),
        }
        for key, allowed in choices.items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"{key}={value!r} is unknown: choose {', '.join(map(repr, allowed))}.")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1.")
        for key in ("temperature", "guidance", "choice_temperature"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)} must be finite and at least 0.")
        if self.mask_updates and self.advance != "sample":
            raise ValueError(
                f"mask_updates=True with advance={self.advance!r} would advance the state by mask tokens: set "
                "advance='sample'."
            )

    def evaluations(self, tokens: int) -> int:
        """Token evaluations per frame of S tokens and per clip, the commit included.

        Mode ``"cached"``: 2 M S + S, or 3 M S + S with ``advance="sample"``; ``"parallel"``: M S + S;
        ``"autoregressive"``: S for the cache, M S, S to advance, and S, in total M S + 3 S. Guidance doubles them.
        """
        passes = {
            "cached": (2 if self.advance == "estimate" else 3) * self.rounds + 1,
            "parallel": self.rounds + 1,
            "autoregressive": self.rounds + 3,
        }[self.mode]
        return passes * tokens * (1 if self.guidance == 1 else 2)

    def masked_share(self, step: int, rounds: int | None = None) -> float:
        """Share of masked tokens after round ``step`` of ``rounds``, counted from 1."""
        done = step / (rounds or self.rounds)
        return math.cos(math.pi / 2 * done) if self.schedule == "cosine" else 1 - done


class FrameStream(Iterator[Tensor]):
    """Iterator over generated frames of tokens (B, h, w) long, at constant memory; see :func:`generate_frames`.

    Attributes:
        states: States after the committed frames.
        evaluations: Token evaluations per clip so far, without those of the prompt.
        generated: Number of generated frames.
    """

    def __init__(
        self,
        model: HydraVideoGenerator,
        conditioning: Conditioning | None,
        num_frames: int | None,
        decoding: FrameDecoding,
        prompt_ids: Tensor | None,
        actions: Tensor | None,
        prompt_actions: Tensor | None,
        generator: Generators,
        num_clips: int | None,
    ):
        conditioning = conditioning or Conditioning()
        if conditioning.actions is not None:
            raise ValueError("conditioning.actions is for training: pass actions=, one per generated frame.")
        self.model, self.decoding, self.conditioning, self._actions = model, decoding, conditioning, actions
        self.num_clips = _num_clips(conditioning, prompt_ids, actions, generator, num_clips)
        self.num_frames = self._checked_length(num_frames, prompt_ids)
        self.chunks = Chunks.of("frame" if decoding.mode == "parallel" else decoding.granularity, model.grid)
        for block in model.layers():
            block.mixer.check_chunks(self.chunks)
        self._generators = _generators(generator, self.num_clips)
        self._device = model.base.device
        self._guided = decoding.guidance != 1
        self._at = self.chunks.positions().to(self._device)
        with torch.no_grad():
            self._clip = torch.cat(
                [model.embed_clip(each, self.num_clips) for each in self._conditionings()]
            )  # (B, D), or (2 B, D) with those without conditioning last
        self.states: States | None = None
        self.evaluations = self.generated = 0
        if prompt_ids is not None:
            self.commit(prompt_ids, prompt_actions)
        elif prompt_actions is not None:
            raise ValueError("prompt_actions requires prompt_ids: pass both, or actions= for generated frames.")

    def __iter__(self) -> "FrameStream":
        return self

    def __next__(self) -> Tensor:
        if self.generated == self.num_frames:
            raise StopIteration
        if self._actions is None or self.states is None:
            return self.step()
        done = self.generated - (self.num_frames or 0) + self._actions.shape[1]  # no action leads to the first frame
        return self.step(self._actions[:, done])

    @torch.no_grad()
    def step(self, action: Tensor | None = None) -> Tensor:
        """Generates and commits the next frame, also beyond ``num_frames``.

        Args:
            action: (B,) or (B, k) long, the actions that lead to the frame; ``None`` for null actions, and for the
                first frame of a video.

        Returns:
            Tokens (B, h, w) long.
        """
        vectors = self._vectors(None if action is None else action[:, None], 1)
        ids = self._decoded(vectors)
        frame = ids.unflatten(1, (1, *self.model.grid))
        self.states = self.model.commit(self._both(frame), vectors, self.states)
        self._count(frame)
        self.generated += 1
        return frame[:, 0]

    def commit(self, ids: Tensor, actions: Tensor | None = None) -> None:
        """Commits given frames (B, t, h, w) after the current ones, such as a prompt in parts.

        Args:
            ids: Final tokens.
            actions: (B, t) or (B, t, k) long, the actions that lead to each frame; one less if these are the first
                frames of a video. ``None`` for null actions.
        """
        vectors = self._vectors(actions, ids.shape[1])
        self.states = self.model.commit(self._both(ids.to(self._device)), vectors, self.states)

    def reset(self) -> None:
        """Resets the states to the initial ones: the next frame does not depend on the committed ones."""
        self.states = self.model.initial_states(len(self._clip))

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def _decoded(self, vectors: Tensor) -> Tensor:
        """Decodes the tokens (B, S) of one frame."""
        decoding, model = self.decoding, self.model
        ids = torch.full((self.num_clips, model.grid[0] * model.grid[1]), model.mask_id, device=self._device)
        if decoding.mode == "autoregressive":
            _, cache = self._cached(ids, vectors)
            for index, at in enumerate(self._at):
                ids[:, at] = self._decoded_chunk(ids[:, at], index, cache)
            return ids
        masked = torch.ones_like(ids, dtype=torch.bool)
        for step in range(1, decoding.rounds + 1):
            if decoding.mode == "parallel":
                logits = self._parallel(ids, vectors)
                ids, confidence = self._filled(ids, masked, logits)
            else:
                logits, cache = self._cached(ids, vectors)
                ids, confidence = self._filled(ids, masked, logits)
                self._update(ids, confidence, masked, cache)
            ids, masked = self._masked(ids, confidence, step)
        return ids

    def _update(self, ids: Tensor, confidence: Tensor, masked: Tensor, cache: FrameCache) -> None:
        """Evaluates and samples the chunks of a frame from left to right; changes ids and confidence in place."""
        decoding, estimate = self.decoding, self.decoding.advance == "estimate"
        for index, at in enumerate(self._at):
            chunk, renewed = ids[:, at], torch.ones_like(masked[:, at])
            if decoding.mask_updates:
                renewed = masked[:, at]
                chunk = chunk.masked_fill(renewed, self.model.mask_id)
            logits = self._chunk(chunk, index, cache, advance=estimate)
            ids[:, at], confidence[:, at] = self._filled(chunk, renewed, logits)
            if not estimate:
                self._chunk(ids[:, at], index, cache, advance=True)

    def _decoded_chunk(self, ids: Tensor, index: int, cache: FrameCache) -> Tensor:
        """Decodes a chunk (B, q) of mask tokens in rounds, and advances the running state over it."""
        masked = torch.ones_like(ids, dtype=torch.bool)
        for step in range(1, self.decoding.rounds + 1):
            logits = self._chunk(ids, index, cache, advance=False)
            ids, confidence = self._filled(ids, masked, logits)
            ids, masked = self._masked(ids, confidence, step)
        self._chunk(ids, index, cache, advance=True)
        return ids

    def _filled(self, ids: Tensor, masked: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Samples the masked tokens (B, n) from logits (B, n, V); also returns log-confidences, infinite elsewhere."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.decoding.temperature:
            total = (logits / self.decoding.temperature).softmax(-1).cumsum(-1)
            threshold = self._uniform(ids.shape[1]).to(total)[..., None] * total[..., -1:]
            sampled = torch.searchsorted(total, threshold, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
        else:
            sampled = logits.argmax(-1)
        confidence = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
        return torch.where(masked, sampled, ids), confidence.masked_fill(~masked, torch.inf)

    def _masked(self, ids: Tensor, confidence: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Masks the tokens (B, n) of the least confidence after a round; also returns where, all false after the
        last."""
        decoding, masked = self.decoding, torch.zeros_like(ids, dtype=torch.bool)
        if step == decoding.rounds:
            return ids, masked
        if decoding.choice_temperature:
            gumbel = -(-self._uniform(ids.shape[1]).log()).log()
            confidence = confidence + decoding.choice_temperature * (1 - step / decoding.rounds) * gumbel.to(confidence)
        count = int(decoding.masked_share(step) * ids.shape[1])
        masked.scatter_(1, confidence.argsort(dim=1, stable=True)[:, :count], True)
        return ids.masked_fill(masked, self.model.mask_id), masked

    # ---- evaluations -------------------------------------------------------------------------------------------------

    def _parallel(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """Evaluates a frame (B, S) -> guided logits (B, S, V)."""
        self._count(ids)
        frame = self._both(ids).unflatten(1, (1, *self.model.grid))
        return self._guide(self.model.evaluate(frame, vectors, self.states)[0].flatten(1, 3))

    def _cached(self, ids: Tensor, vectors: Tensor) -> tuple[Tensor, FrameCache]:
        self._count(ids)
        logits, cache = self.model.cache_frame(self._both(ids), vectors, self.chunks, self.states)
        return self._guide(logits), cache

    def _chunk(self, ids: Tensor, index: int, cache: FrameCache, advance: bool) -> Tensor:
        self._count(ids)
        return self._guide(self.model.update_chunk(self._both(ids), index, cache, advance))

    def _count(self, ids: Tensor) -> None:
        self.evaluations += ids[0].numel() * (2 if self._guided else 1)

    def _both(self, ids: Tensor) -> Tensor:
        """Repeats a batch for the evaluation without conditioning."""
        return torch.cat([ids, ids]) if self._guided else ids

    def _guide(self, logits: Tensor) -> Tensor:
        if not self._guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.decoding.guidance * (conditional - unconditional)

    # ---- conditioning and noise --------------------------------------------------------------------------------------

    def _conditionings(self) -> list[Conditioning]:
        given = [self.conditioning]
        if self._guided:
            given.append(
                self.conditioning._replace(drop=torch.ones(self.num_clips, dtype=torch.bool, device=self._device))
            )
        return given

    def _vectors(self, actions: Tensor | None, frames: int) -> Tensor:
        """Vectors (B or 2 B, 1 or frames, D) of the next frames and the actions (B, n) that lead to them."""
        actions = None if actions is None else actions.to(self._device)
        embedded = [
            self.model.embed_actions(actions, self.num_clips, frames, self.states is None, each.drop)
            for each in self._conditionings()
        ]
        clip = self._clip[:, None]
        return clip if embedded[0] is None else clip + torch.cat([each for each in embedded if each is not None])

    def _uniform(self, count: int) -> Tensor:
        """Uniform numbers (B, count) in (0, 1), drawn separately for each clip."""
        if self._generators is None:
            drawn = torch.rand(self.num_clips, count, dtype=torch.float64)
        else:
            rows = [
                torch.rand(count, generator=each, dtype=torch.float64, device=each.device).cpu()
                for each in self._generators
            ]
            drawn = torch.stack(rows)
        return drawn.clamp_(min=torch.finfo(torch.float64).tiny).to(self._device)

    def _checked_length(self, num_frames: int | None, prompt_ids: Tensor | None) -> int | None:
        """Returns the number of frames to generate, ``None`` for no limit, after comparing it with the actions."""
        actions, first = self._actions, prompt_ids is None
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1, or None for no limit.")
        if actions is None:
            return num_frames
        with torch.no_grad():  # raises for actions out of range, before the first frame
            self.model.embed_actions(actions.to(self.model.base.device), self.num_clips, actions.shape[1], first=False)
        fitting = actions.shape[1] + first
        if num_frames not in (None, fitting):
            raise ValueError(
                f"actions has {actions.shape[1]} per clip, but num_frames={num_frames} requires {num_frames - first}, "
                f"one per generated frame{' but the first, to which no action leads' if first else ''}: use "
                f"num_frames={fitting}, or pass {num_frames - first} actions."
            )
        return fitting


def generate_frames(
    model: HydraVideoGenerator,
    conditioning: Conditioning | None = None,
    num_frames: int | None = None,
    decoding: FrameDecoding | None = None,
    prompt_ids: Tensor | None = None,
    actions: Tensor | None = None,
    prompt_actions: Tensor | None = None,
    generator: Generators = None,
    num_clips: int | None = None,
) -> FrameStream:
    """Generates videos frame by frame.

    A clip does not depend on the rest of its batch, up to the rounding of the model.

    Args:
        model: Trained generator.
        conditioning: Labels and text of the clips, without actions.
        num_frames: Frames of tokens to generate after the prompt; ``None`` for as many as there are actions, or
            without them for no limit.
        decoding: Settings; ``None`` for the defaults.
        prompt_ids: Given first frames (B, t, h, w) long, which are committed and not returned.
        actions: Actions (B, n) or (B, n, k) long that lead to each generated frame. Without a prompt, n is
            ``num_frames`` - 1, because no action leads to the first frame. ``None`` for null actions.
        prompt_actions: Actions (B, t - 1) or (B, t - 1, k) of the prompt; ``None`` for null actions.
        generator: Generator that draws the seed of each clip, or one generator or seed per clip; ``None`` for torch's
            global generator.
        num_clips: B; ``None`` for that of the prompt, conditioning, actions or generators, or else 1.

    Returns:
        Iterator over frames of tokens (B, h, w) long.

    Raises:
        ValueError: For settings or a granularity that do not fit the model, a number of actions, generators or
            conditions that does not fit, or tokens out of range.

    Example::

        >>> import torch
        >>> from blueberry_video.inference.frame_generation import generate_frames
        >>> from blueberry_video.models.hydra_video.generator import HydraVideoGenerator
        >>> model = HydraVideoGenerator(8, (2, 2), embed_dim=16, depth=1, head_dim=8, state_dim=4)
        >>> frames = generate_frames(model, num_frames=3, generator=[0, 1])
        >>> [tuple(frame.shape) for frame in frames], frames.evaluations
        ([(2, 2, 2), (2, 2, 2), (2, 2, 2)], 108)
    """
    decoding = decoding or FrameDecoding()
    return FrameStream(
        model, conditioning, num_frames, decoding, prompt_ids, actions, prompt_actions, generator, num_clips
    )


def collect_frames(frames: FrameStream) -> Tensor:
    """Returns all frames of a stream of limited length, (B, t, h, w) long.

    Raises:
        ValueError: If the stream has no limit.
    """
    if frames.num_frames is None:
        raise ValueError("num_frames=None generates without limit: set num_frames, or iterate over the frames.")
    return torch.stack(list(frames), dim=1)


def generate_clips(
    model: HydraVideoGenerator,
    conditioning: Conditioning,
    num_frames: int,
    decoding: FrameDecoding,
    prompt_ids: Tensor | None = None,
    generator: Generators = None,
    num_clips: int | None = None,
) -> Tensor:
    """Generates clips of tokens (B, num_frames, h, w) that begin with the frames of ``prompt_ids``, if any.

    Args:
        conditioning: With the actions of all frames but the first, those of the prompt included.
        model, decoding, prompt_ids, generator, num_clips: See :func:`generate_frames`.

    Raises:
        ValueError: See :func:`generate_frames`; also for a prompt of ``num_frames`` frames or more.
    """
    known, rest, actions = 0, conditioning._replace(actions=None), conditioning.actions
    given: Tensor | None = None
    if prompt_ids is not None:
        known = prompt_ids.shape[1]
        if known >= num_frames:
            raise ValueError(f"the prompt has {known} frames: num_frames={num_frames} must be at least {known + 1}.")
        if actions is not None:
            given, actions = actions[:, : known - 1], actions[:, known - 1 :]
    count = num_frames - known
    frames = generate_frames(model, rest, count, decoding, prompt_ids, actions, given, generator, num_clips)
    made = collect_frames(frames)
    return made if prompt_ids is None else torch.cat([prompt_ids.to(made), made], dim=1)


def _num_clips(
    conditioning: Conditioning,
    prompt_ids: Tensor | None,
    actions: Tensor | None,
    generator: Generators,
    num_clips: int | None,
) -> int:
    """Returns the number of clips, and checks that all arguments have it."""
    sizes = {"num_clips": num_clips}
    for name, value in (("prompt_ids", prompt_ids), ("actions", actions), ("text", conditioning.text)):
        sizes[name] = None if value is None else len(value)
    sizes |= {f"labels.{label}": len(value) for label, value in (conditioning.labels or {}).items()}
    sizes["generator"] = len(generator) if isinstance(generator, Sequence) else None
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(set(given.values())) > 1 or 0 in given.values():
        listed = ", ".join(f"{name}: {size}" for name, size in given.items())
        raise ValueError(f"the number of clips differs or is 0 ({listed}): pass one entry per clip in each.")
    return next(iter(given.values()), 1)


def _generators(generator: Generators, count: int) -> list[torch.Generator] | None:
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return clip_generators(generator, count)
    return [each if isinstance(each, torch.Generator) else torch.Generator().manual_seed(each) for each in generator]
