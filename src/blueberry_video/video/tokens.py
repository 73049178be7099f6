"""Token counts of a video, their memory in a model, and the frames and sizes that fit its context.

Three rules cover the models in conf/video: a grid of patches merged over space and time (Qwen-VL, LLaVA-NeXT-Video,
Gemma), a constant per frame (InternVL, LLaVA-OneVision, Gemini), and tiles of a frame (GPT-4V and GPT-4o). Every rule
is a product, frames // temporal_patch_size groups times the tokens of a group, plus the text tokens that the prompt
adds around the groups. All sizes are those after resizing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from blueberry_video.video.errors import LimitError
from blueberry_video.video.ranges import check_at_least, check_choice

COUNTS = ("patches", "per_frame", "tiles")
MARKS = ("none", "number", "seconds", "clock")
DETAILS = ("low", "high")
# bytes per weight, bytes per value
PRECISIONS = {"fp32": (4.0, 4), "bf16": (2.0, 2), "int8": (1.0, 2), "int4": (0.5, 2)}
UNKNOWN_TIME_DIGITS = 6  # digits of a mark without known times: enough for 99,999.9 seconds

_AT_LEAST_ONE = (
    *("patch_size", "merge_size", "temporal_patch_size", "tokens_per_frame", "tile_size", "base_tokens", "tile_fit"),
    *("tile_short_side", "context_length", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "num_parameters"),
)


@dataclass(frozen=True)
class TokenOptions:
    """Token counting of a model; conf/video holds one profile per model.

    Attributes:
        count: ``patches`` (a grid over the frame), ``per_frame`` (a constant) or ``tiles`` (of a downscaled frame).
        patch_size: side of a patch of the vision encoder, in pixels, without merge_size (14, not 14 · 2 = 28).
        merge_size: patches per side merged into one token; height and width must be multiples of
            patch_size · merge_size.
        temporal_patch_size: frames per group that share tokens; the last frame is repeated to fill the last group.
        tokens_per_frame: tokens of a group of frames, for ``count: per_frame``.
        tokens_per_video: tokens per video: start and end marks, a separator.
        mark: text before each group, with one token per digit: ``none``, ``number`` (``Frame12:``), ``seconds``
            (``<12.5 seconds>``) or ``clock`` (``01:05``).
        tokens_per_mark: tokens per group in addition to those digits: words, punctuation, start and end of the image.
        tile_detail: ``low`` (base_tokens only) or ``high`` (also tiles), for ``count: tiles``.
        tile_size, tile_tokens, base_tokens: side of a tile in pixels, tokens per tile, tokens per frame.
        tile_fit, tile_short_side: before tiles are counted, a frame is downscaled to fit a square of side tile_fit,
            then to a shorter side of tile_short_side; smaller frames are unchanged.
        context_length: context length of the model in tokens; None: unknown, no limit.
        reserved_tokens: tokens of the context reserved for the prompt and the answer.
        hidden_size: width of the language model, i.e. of a visual embedding; None: not published.
        num_layers, num_kv_heads, head_dim: sizes of the language model, for its KV cache; None: not published.
        num_parameters: parameters of the whole model; None: not published.
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
            check_choice(key, getattr(self, key), choices)
        check_at_least(1, **{key: getattr(self, key) for key in _AT_LEAST_ONE})
        not_negative = ("tokens_per_video", "tokens_per_mark", "tile_tokens", "reserved_tokens")
        check_at_least(0, **{key: getattr(self, key) for key in not_negative})
        if self.context_length is not None and self.reserved_tokens >= self.context_length:
            problem = f"reserved_tokens={self.reserved_tokens} must be below context_length={self.context_length}"
            raise ValueError(f"{problem}, or no token remains for the video: lower it.")

    @property
    def size_step(self) -> int:
        """Step of height and width in pixels."""
        return self.patch_size * self.merge_size if self.count == "patches" else 1

    @property
    def budget(self) -> int | None:
        """Token limit of a video; None: unlimited."""
        return None if self.context_length is None else self.context_length - self.reserved_tokens


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a video: ``visual`` tokens of the pixels and ``text`` tokens that the prompt adds around them.

    ``grid_thw`` counts patches before merging, as HuggingFace's ``video_grid_thw``; None for models without a grid.
    """

    grid_thw: tuple[int, int, int] | None
    visual: int
    text: int

    @property
    def total(self) -> int:
        return self.visual + self.text


@dataclass(frozen=True)
class Fit:
    """Comparison of a video with the context length of a model.

    Attributes:
        tokens: tokens of the video.
        budget: token limit of the video; None: unlimited.
        max_frames: most frames that fit at this size, in whole groups; 0: no group fits; None: unlimited.
        max_size: largest (height, width) of the same aspect ratio, at most the given size, that fits at this number of
            frames; None: no size fits.
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
    """Memory of one video in a model, in bytes; None: the required sizes of the model are not published."""

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
    """Returns the tokens of a video of ``num_frames`` frames of ``height`` × ``width`` pixels after resizing.

    Args:
        num_frames: frames of the video; the last is repeated to fill a group of temporal_patch_size.
        height, width: size of a frame in pixels, multiples of ``options.size_step``.
        options: profile of the model.
        timestamps: seconds of every frame, for the digits of time marks; if None, marks are assumed to have
            ``UNKNOWN_TIME_DIGITS`` digits, an upper bound for videos of under a day.

    Raises:
        ValueError: a number below 1, a size that is not a multiple of the step, or a wrong number of timestamps.
    """
    _check_video(num_frames, height, width, options)
    groups = _groups(num_frames, options)
    grid = None
    if options.count == "patches":
        grid = (groups, height // options.patch_size, width // options.patch_size)
    text = _text(groups, options)
    if timestamps is not None and options.mark in ("seconds", "clock"):
        if len(timestamps) != num_frames:
            raise ValueError(f"{len(timestamps)} timestamps for num_frames={num_frames}: pass one per frame.")
        text += _time_digits(timestamps, options) - groups * UNKNOWN_TIME_DIGITS
    return TokenCount(grid, groups * _per_group(height, width, options), text)


def fit(num_frames: int, height: int, width: int, options: TokenOptions) -> Fit:
    """Compares a video with the context length of a model and finds the most frames and the largest size that fit.

    Both are exact: neither one more group of frames nor the next larger size of the same aspect ratio fits. The size is
    never enlarged. Time marks count as in :func:`count_tokens` without timestamps; raises as that function.
    """
    tokens = count_tokens(num_frames, height, width, options)
    if (budget := options.budget) is None:
        return Fit(tokens, None, None, (height, width))
    per_group = _per_group(height, width, options)
    # every group has at least one token, so that at most ``budget`` groups fit
    groups = bisect_right(range(1, budget + 1), budget, key=lambda g: g * per_group + _text(g, options))
    fits = tokens.total <= budget
    size = (height, width) if fits else _largest_size(num_frames, height, width, options, budget)
    return Fit(tokens, budget, groups * options.temporal_patch_size, size)


def validate(num_frames: int, height: int, width: int, options: TokenOptions) -> TokenCount:
    """Returns the tokens of a video after checking that it fits the context of the model.

    Raises:
        LimitError: it does not fit; the message names the most frames and the largest size that fit.
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
        f"{num_frames} frames of {height}x{width} pixels are {found.tokens.total} tokens, but context_length="
        f"{options.context_length} minus reserved_tokens={options.reserved_tokens} is {found.budget}: "
        f"{', or '.join(fixes) or 'lower reserved_tokens, or use a model with a longer context'}."
    )


def memory_estimate(num_frames: int, height: int, width: int, options: TokenOptions) -> dict[str, MemoryEstimate]:
    """Estimates the memory of one video in a model, in bytes, for each precision of ``PRECISIONS``.

    With b bytes per value (4 in fp32, else 2: int8 and int4 quantize weights only) and T frames padded to whole groups:

    - pixels: T · 3 · H · W · b;
    - embeddings: visual tokens · hidden_size · b;
    - kv_cache: 2 · num_layers · num_kv_heads · head_dim · (tokens + reserved_tokens) · b;
    - weights: num_parameters · 4, 2, 1 or 0.5.

    Not included: activations of the vision encoder and of the prefill, logits, scales and zero points of quantized
    weights, sliding windows or sharing that reduce the cache, memory of the runtime and fragmentation; and the decoded
    frames before resizing, which are in host memory. Raises as :func:`count_tokens`.
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
    """Returns the largest batch of videos of this size with an estimate within ``memory_bytes``; 0 if none fits.

    Args:
        memory_bytes: memory of the device.
        num_frames, height, width, options: as ``count_tokens``.
        precision: one of ``PRECISIONS``.
        headroom: share of the memory, in [0, 1), kept free for everything that ``memory_estimate`` does not include.

    Raises:
        ValueError: an unknown precision, a share out of range, unpublished sizes, or as :func:`count_tokens`.
    """
    check_choice("precision", precision, PRECISIONS)
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom} must be at least 0 and below 1: it is a share of the memory.")
    estimate = memory_estimate(num_frames, height, width, options)[precision]
    if estimate.total is None or estimate.weights is None:
        raise ValueError(
            "The memory of this model is unknown, because its profile lacks hidden_size, num_layers, num_kv_heads, "
            "head_dim or num_parameters: pass them as overrides."
        )
    free = memory_bytes * (1 - headroom) - estimate.weights
    return max(int(free // (estimate.total - estimate.weights)), 0)


def _check_video(num_frames: int, height: int, width: int, options: TokenOptions) -> None:
    if min(num_frames, height, width) < 1:
        raise ValueError(f"num_frames={num_frames} of {height}x{width} pixels: each must be at least 1.")
    step = options.size_step
    if height % step or width % step:
        near = [max(step, round(side / step) * step) for side in (height, width)]
        raise ValueError(
            f"{height}x{width} pixels must be multiples of patch_size={options.patch_size} · merge_size="
            f"{options.merge_size} = {step}: resize to {near[0]}x{near[1]}, or set size_factor={step}."
        )


def _groups(num_frames: int, options: TokenOptions) -> int:
    return -(-num_frames // options.temporal_patch_size)


def _per_group(height: int, width: int, options: TokenOptions) -> int:
    """Returns the visual tokens of one group of frames."""
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
    """Returns the exact scale of a frame before tiling, so that a side of exactly one tile never counts as two."""
    fit_square = Fraction(options.tile_fit, max(height, width))
    return min(Fraction(1), fit_square, Fraction(options.tile_short_side, min(height, width)))


def _text(groups: int, options: TokenOptions) -> int:
    """Returns the text tokens around a number of groups, with marks of unknown times."""
    digits = 0
    if options.mark == "number":  # digits of 1 … groups: each has a last digit, those from 10 a second, and so on
        digits = sum(groups - 10**power + 1 for power in range(len(str(groups))))
    elif options.mark != "none":
        digits = groups * UNKNOWN_TIME_DIGITS
    return options.tokens_per_video + groups * options.tokens_per_mark + digits


def _time_digits(timestamps: Sequence[float], options: TokenOptions) -> int:
    """Returns the digits of the time marks: the mean time of each group's first and last frame, as in Qwen3-VL."""
    digits, last = 0, len(timestamps) - 1
    for i in range(0, len(timestamps), options.temporal_patch_size):
        time = (timestamps[i] + timestamps[min(i + options.temporal_patch_size - 1, last)]) / 2
        mark = f"{int(time // 60):02d}{int(time % 60):02d}" if options.mark == "clock" else f"{time:.1f}"
        digits += sum(character.isdigit() for character in mark)
    return digits


def _largest_size(
    num_frames: int, height: int, width: int, options: TokenOptions, budget: int
) -> tuple[int, int] | None:
    """Returns the largest size of the given aspect ratio that fits, over every scale at which a side gains a step.

    Scales are k / (rows · columns): k // columns rows and k // rows columns change exactly where a side grows by a
    step, so that no size is skipped.
    """
    if options.count == "per_frame" or (options.count == "tiles" and options.tile_detail == "low"):
        return None
    if options.count == "tiles":  # larger frames have the same number of tiles
        scale = _tile_scale(height, width, options)
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
    step, groups = options.size_step, _groups(num_frames, options)
    rows, columns = height // step, width // step

    def size(k: int) -> tuple[int, int]:
        return max(1, k // columns) * step, max(1, k // rows) * step

    def tokens(k: int) -> int:
        return groups * _per_group(*size(k), options) + _text(groups, options)

    k = bisect_right(range(1, rows * columns + 1), budget, key=tokens)
    return size(k) if k else None
