"""How many tokens a model makes of a video, what they need in memory, and what of them fits into its context.

Three rules cover the models there are profiles of: a grid of patches that are merged over space and time (Qwen-VL,
LLaVA-NeXT-Video, Gemma), a constant a frame (InternVL, LLaVA-OneVision, Gemini), and tiles of a frame (GPT-4V and
GPT-4o). Every rule is a product, frames // temporal_patch_size groups times the tokens of a group, plus what the
model's prompt puts around the groups. Sizes are always those after resizing.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from blueberry_video.video.errors import LimitError

COUNTS = ("patches", "per_frame", "tiles")
MARKS = ("none", "number", "seconds", "clock")
DETAILS = ("low", "high")
PRECISIONS = {"fp32": (4.0, 4), "bf16": (2.0, 2), "int8": (1.0, 2), "int4": (0.5, 2)}  # bytes: a weight, a value
UNKNOWN_TIME_DIGITS = 6  # of a mark where times are not known: enough for 99,999.9 seconds

_AT_LEAST_ONE = (
    *("patch_size", "merge_size", "temporal_patch_size", "tokens_per_frame", "tile_size", "base_tokens", "tile_fit"),
    *("tile_short_side", "context_length", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "num_parameters"),
)


@dataclass(frozen=True)
class TokenOptions:
    """How a model counts; one profile a model in conf/video.

    Attributes:
        count: ``patches`` (a grid, from the size), ``per_frame`` (a constant) or ``tiles`` (of a shrunken frame).
        patch_size: side of a patch of the vision encoder, in pixels; NOT times merge_size (28 is 14 · 2).
        merge_size: patches a side that become one token; height and width must be multiples of patch_size · merge_size.
        temporal_patch_size: frames that share their tokens; the last frame is repeated to fill the last group.
        tokens_per_frame: of a group of frames, for ``count: per_frame``.
        tokens_per_video: once a video: start and end marks, a separator.
        mark: text before each group whose digits are a token each: none, its number (``Frame12:``), its time in
            seconds (``<12.5 seconds>``), or on a clock (``01:05``).
        tokens_per_mark: around each group beside those digits: words, punctuation, start and end of the picture.
        tile_detail: ``low`` (base_tokens alone) or ``high`` (tiles as well), for ``count: tiles``.
        tile_size, tile_tokens, base_tokens: side of a tile in pixels, tokens of one, tokens of every frame.
        tile_fit, tile_short_side: a frame is shrunk to fit a square of the first, then to a short side of the second,
            before tiles are counted; a smaller frame is left as it is.
        context_length: tokens the model takes in all; None: unknown, nothing is refused.
        reserved_tokens: of those, kept for the prompt and the answer.
        hidden_size: width of the language model, i.e. of a visual embedding; None: not published.
        num_layers, num_kv_heads, head_dim: of the language model, for its key-value cache; None: not published.
        num_parameters: of the whole model; None: not published.
    """

    count: str = "patches"
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_frame: int = 256
    tokens_per_video: int = 0
    mark: str = "none"
    tokens_per_mark: int = 0
    tile_detail: str = "high"
    tile_size: int = 512
    tile_tokens: int = 170
    base_tokens: int = 85
    tile_fit: int = 2048
    tile_short_side: int = 768
    context_length: int | None = None
    reserved_tokens: int = 1024
    hidden_size: int | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_parameters: int | None = None

    def __post_init__(self) -> None:
        for key, choices in (("count", COUNTS), ("mark", MARKS), ("tile_detail", DETAILS)):
            if (choice := getattr(self, key)) not in choices:
                raise ValueError(f"{key}={choice!r} is not one of {', '.join(choices)}.")
        for key in _AT_LEAST_ONE:
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1.")
        for key in ("tokens_per_video", "tokens_per_mark", "tile_tokens", "reserved_tokens"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"{key}={value} must not be negative.")
        if self.context_length is not None and self.reserved_tokens >= self.context_length:
            raise ValueError(
                f"reserved_tokens={self.reserved_tokens} leaves nothing of context_length={self.context_length} to the "
                "video: lower it."
            )

    @property
    def size_step(self) -> int:
        """What height and width must be multiples of, in pixels."""
        return self.patch_size * self.merge_size if self.count == "patches" else 1

    @property
    def budget(self) -> int | None:
        """Tokens that a video may take; None: unlimited."""
        return None if self.context_length is None else self.context_length - self.reserved_tokens


@dataclass(frozen=True)
class TokenCount:
    """``visual`` tokens stand for pixels; ``text`` tokens are what the prompt puts around them. ``grid_thw`` counts
    patches before merging, as HuggingFace's ``video_grid_thw``; None where the model has no such grid."""

    grid_thw: tuple[int, int, int] | None
    visual: int
    text: int

    @property
    def total(self) -> int:
        return self.visual + self.text


@dataclass(frozen=True)
class Fit:
    """Whether a video fits a model's context, and what would.

    Attributes:
        tokens: of the video as it is.
        budget: tokens that it may take; None: unlimited, everything fits.
        max_frames: most frames that fit at this size, whole groups; 0: not one group fits; None: unlimited.
        max_size: largest (height, width), at most the given one and of its shape, that fits at this number of frames;
            None: no size does.
    """

    tokens: TokenCount
    budget: int | None
    max_frames: int | None
    max_size: tuple[int, int] | None

    @property
    def fits(self) -> bool:
        return self.budget is None or self.tokens.total <= self.budget


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what takes them; None: the model does not publish what it would need to know."""

    pixels: int
    embeddings: int | None
    kv_cache: int | None
    weights: int | None

    @property
    def total(self) -> int | None:
        if self.embeddings is None or self.kv_cache is None or self.weights is None:
            return None
        return self.pixels + self.embeddings + self.kv_cache + self.weights


def count_tokens(
    num_frames: int, height: int, width: int, options: TokenOptions, timestamps: Sequence[float] | None = None
) -> TokenCount:
    """Tokens of a video of ``num_frames`` frames of ``height`` × ``width`` pixels after resizing.

    Args:
        num_frames: frames that the model is shown; the last is repeated to fill a group of temporal_patch_size.
        height, width: of a frame, in pixels, multiples of ``options.size_step``.
        options: the model's profile.
        timestamps: seconds of every frame, for the digits of time marks; without them, marks are taken to have
            ``UNKNOWN_TIME_DIGITS`` digits, which no video of under a day exceeds.

    Raises:
        ValueError: a number below 1, a size that is no multiple of the step, timestamps of another number of frames.
    """
    _check_video(num_frames, height, width, options)
    groups = _groups(num_frames, options)
    grid = None
    if options.count == "patches":
        grid = (groups, height // options.patch_size, width // options.patch_size)
    if timestamps is None or options.mark in ("none", "number"):
        return TokenCount(grid, groups * _per_group(height, width, options), _text(groups, options))
    if len(timestamps) != num_frames:
        raise ValueError(f"{len(timestamps)} timestamps were given for num_frames={num_frames}: give one a frame.")
    digits = sum(len(_time_mark(time, options.mark)) for time in _group_times(timestamps, options.temporal_patch_size))
    text = options.tokens_per_video + groups * options.tokens_per_mark + digits
    return TokenCount(grid, groups * _per_group(height, width, options), text)


def fit(num_frames: int, height: int, width: int, options: TokenOptions) -> Fit:
    """Compares a video with the model's context length, and finds the most frames and the largest size that fit.

    Both are exact: one group of frames more does not fit, and neither does the next larger size of the same shape.
    A size is only ever made smaller. Time marks count as in ``count_tokens`` without timestamps.

    Raises:
        ValueError: as ``count_tokens``.
    """
    tokens = count_tokens(num_frames, height, width, options)
    if (budget := options.budget) is None:
        return Fit(tokens, None, None, (height, width))
    per_group = _per_group(height, width, options)
    # every group takes at least a token, so that no more than the budget of them can fit
    groups = _count_within(budget, budget, lambda g: g * per_group + _text(g, options))
    fits = tokens.total <= budget
    size = (height, width) if fits else _largest_size(num_frames, height, width, options, budget)
    return Fit(tokens, budget, groups * options.temporal_patch_size, size)


def validate(num_frames: int, height: int, width: int, options: TokenOptions) -> TokenCount:
    """The tokens of a video that fits the model's context.

    Raises:
        LimitError: it does not; the message names the most frames and the largest size that do.
        ValueError: as ``count_tokens``.
    """
    found = fit(num_frames, height, width, options)
    if found.fits:
        return found.tokens
    fixes = []
    if found.max_frames:
        fixes.append(f"take at most {found.max_frames} frames at this size (max_frames={found.max_frames})")
    if found.max_size is not None:
        fixes.append(f"resize to at most {found.max_size[0]}x{found.max_size[1]} at this number of frames")
    raise LimitError(
        f"{num_frames} frames of {height}x{width} pixels make {found.tokens.total} tokens, but context_length="
        f"{options.context_length} less reserved_tokens={options.reserved_tokens} leaves {found.budget}: "
        f"{', or '.join(fixes) or 'this model takes no such video; lower reserved_tokens or use another model'}."
    )


def memory_estimate(num_frames: int, height: int, width: int, options: TokenOptions) -> dict[str, MemoryEstimate]:
    """Bytes that one video takes in the model's memory, for each precision of ``PRECISIONS``.

    With b the bytes of a value (4 in fp32, 2 in the others: int8 and int4 quantise weights alone) and T frames filled
    up to whole groups:

    - pixels: T · 3 · H · W · b;
    - embeddings: visual tokens · hidden_size · b;
    - kv_cache: 2 · num_layers · num_kv_heads · head_dim · (tokens + reserved_tokens) · b;
    - weights: num_parameters · 4, 2, 1 or 0.5.

    Left out: activations of the vision encoder and of the prefill, logits, scales and zero points of quantised
    weights, windows or sharing that make a cache smaller, the runtime's own memory and fragmentation; and the decoded
    frames before resizing, which lie in the host's memory.

    Raises:
        ValueError: as ``count_tokens``.
    """
    tokens = count_tokens(num_frames, height, width, options)
    pixels = _groups(num_frames, options) * options.temporal_patch_size * 3 * height * width
    layers, heads, head_dim = options.num_layers, options.num_kv_heads, options.head_dim
    cached = None
    if layers is not None and heads is not None and head_dim is not None:
        cached = 2 * layers * heads * head_dim * (tokens.total + options.reserved_tokens)
    return {
        precision: MemoryEstimate(
            pixels=pixels * per_value,
            embeddings=None if options.hidden_size is None else tokens.visual * options.hidden_size * per_value,
            kv_cache=None if cached is None else cached * per_value,
            weights=None if options.num_parameters is None else ceil(options.num_parameters * per_weight),
        )
        for precision, (per_weight, per_value) in PRECISIONS.items()
    }


def recommend_batch_size(
    memory_bytes: int,
    num_frames: int,
    height: int,
    width: int,
    options: TokenOptions,
    precision: str = "bf16",
    headroom: float = 0.2,
) -> int:
    """The most videos of this size whose estimate fits into ``memory_bytes``; 0 where not even one does.

    Args:
        memory_bytes: of the device.
        num_frames, height, width, options: as ``count_tokens``.
        precision: one of ``PRECISIONS``.
        headroom: share of the memory, in [0, 1), kept free for what ``memory_estimate`` leaves out.

    Raises:
        ValueError: an unknown precision, a share outside its range, a model whose sizes are not published, or as
            ``count_tokens``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom} must be at least 0 and below 1: it is a share of the memory.")
    estimate = memory_estimate(num_frames, height, width, options)[precision]
    if estimate.total is None or estimate.weights is None:
        raise ValueError(
            "this model's profile does not say hidden_size, num_layers, num_kv_heads, head_dim and num_parameters, so "
            "that its memory is not known: give them as overrides."
        )
    free = memory_bytes * (1 - headroom) - estimate.weights
    return max(int(free // (estimate.total - estimate.weights)), 0)


def _check_video(num_frames: int, height: int, width: int, options: TokenOptions) -> None:
    if min(num_frames, height, width) < 1:
        raise ValueError(f"{num_frames} frames of {height}x{width} pixels: each number must be at least 1.")
    step = options.size_step
    if height % step or width % step:
        near = [max(step, round(side / step) * step) for side in (height, width)]
        raise ValueError(
            f"{height}x{width} pixels are no whole number of tokens of patch_size={options.patch_size} · merge_size="
            f"{options.merge_size} = {step} pixels: resize to {near[0]}x{near[1]}, or set size_factor={step}."
        )


def _groups(num_frames: int, options: TokenOptions) -> int:
    return -(-num_frames // options.temporal_patch_size)


def _per_group(height: int, width: int, options: TokenOptions) -> int:
    """Visual tokens of one group of frames."""
    match options.count:
        case "patches":
            return (height // options.size_step) * (width // options.size_step)
        case "per_frame":
            return options.tokens_per_frame
    if options.tile_detail == "low":
        return options.base_tokens
    scale = _tile_scale(height, width, options)
    tiles = ceil(height * scale / options.tile_size) * ceil(width * scale / options.tile_size)
    return options.base_tokens + options.tile_tokens * tiles


def _tile_scale(height: int, width: int, options: TokenOptions) -> Fraction:
    """Exact, so that a side of exactly one tile is never counted as two."""
    fit_square = Fraction(options.tile_fit, max(height, width))
    return min(Fraction(1), fit_square, Fraction(options.tile_short_side, min(height, width)))


def _text(groups: int, options: TokenOptions) -> int:
    """Tokens around so many groups, with marks whose times are not known."""
    digits = 0
    if options.mark == "number":  # of 1 … groups: every number has a last digit, those from 10 one more, and so on
        digits = sum(groups - 10**place + 1 for place in range(len(str(groups))))
    elif options.mark != "none":
        digits = groups * UNKNOWN_TIME_DIGITS
    return options.tokens_per_video + groups * options.tokens_per_mark + digits


def _group_times(timestamps: Sequence[float], size: int) -> list[float]:
    """The middle between the first and the last frame of each group, as Qwen3-VL's processor marks them."""
    last = len(timestamps) - 1
    return [(timestamps[i] + timestamps[min(i + size - 1, last)]) / 2 for i in range(0, len(timestamps), size)]


def _time_mark(time: float, mark: str) -> str:
    """The digits of a time mark."""
    if mark == "clock":
        return f"{int(time // 60):02d}{int(time % 60):02d}"
    return f"{time:.1f}".replace(".", "").lstrip("-")


def _count_within(budget: int, most: int, tokens: Callable[[int], int]) -> int:
    """How many of 1 … ``most`` have tokens(n) ≤ budget, for a function that never falls."""
    return bisect_right(range(1, most + 1), budget, key=tokens)


def _largest_size(
    num_frames: int, height: int, width: int, options: TokenOptions, budget: int
) -> tuple[int, int] | None:
    """The largest size of the given shape that fits, over every scale at which a side gains a step.

    Scales are k / (rows · columns): at such a k, k // columns rows and k // rows columns are whole exactly where a side
    grows, so that no size between two neighbours is missed.
    """
    if options.count == "per_frame" or (options.count == "tiles" and options.tile_detail == "low"):
        return None
    if options.count == "tiles":  # beyond this size nothing grows but the file
        scale = _tile_scale(height, width, options)
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
    step, groups = options.size_step, _groups(num_frames, options)
    rows, columns = height // step, width // step

    def size(k: int) -> tuple[int, int]:
        return max(1, k // columns) * step, max(1, k // rows) * step

    k = _count_within(budget, rows * columns, lambda k: groups * _per_group(*size(k), options) + _text(groups, options))
    return size(k) if k else None
