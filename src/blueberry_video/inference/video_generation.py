"""Generation of pixels frame by frame: frames of tokens are generated, decoded and returned one after the other.

The states of generator and tokenizer have a constant size, so memory and time per frame do not depend on the number of
frames.

Shapes: B clips of T x H x W pixels, (h, w) grid of tokens of a frame; a frame of tokens after the first covers k frames
of pixels.
"""

from collections.abc import Iterator

from torch import Tensor

from blueberry_video.inference.frame_generation import FrameDecoding, FrameStream, Generators, generate_frames
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer


def stream_video(
    model: HydraVideoGenerator,
    tokenizer: HydraVideoTokenizer,
    conditioning: Conditioning | None = None,
    num_frames: int | None = None,
    decoding: FrameDecoding | None = None,
    prompt: Tensor | None = None,
    actions: Tensor | None = None,
    prompt_actions: Tensor | None = None,
    generator: Generators = None,
    num_clips: int | None = None,
) -> Iterator[Tensor]:
    """Generates the pixels of videos, one frame of tokens at a time, at constant memory.

    The concatenation of the parts equals ``tokenizer.decode_ids`` of the tokens of
    :func:`~blueberry_video.inference.frame_generation.generate_clips`, up to rounding. Arguments are checked by the
    call, before the first frame.

    Args:
        model: Trained generator, in evaluation mode.
        tokenizer: Tokenizer on which it was trained, on the same device.
        conditioning: Labels and text of the clips, without actions.
        num_frames: Frames of pixels T of the videos, 1 + a multiple of k, those of the prompt included; ``None`` for as
            many as there are actions, or without them for no limit.
        decoding: Settings; ``None`` for the defaults.
        prompt: First frames (B, 3, 1 + k n, H, W) in [-1, 1], which are encoded and continued.
        actions: Actions (B, n) or (B, n, actions_per_frame) long that lead to each generated frame of tokens. Without a
            prompt, no action leads to the first frame. ``None`` for null actions.
        prompt_actions: The same of the frames of tokens of the prompt after the first; ``None`` for null actions.
        generator: Generator that draws the seed of each clip, or one generator or seed per clip; ``None`` for torch's
            global generator.
        num_clips: B; ``None`` for that of the prompt, conditioning, actions or generators, or else 1.

    Returns:
        Iterator over consecutive parts (B, 3, 1 or k, H, W) in [-1, 1], the first of 1 frame, that begin with the
        reconstruction of the prompt.

    Raises:
        ValueError: For a tokenizer of a different vocabulary or grid; a number of frames that the tokenizer rejects
            (the message names the nearest legal one), that the prompt leaves no frame of, or that differs from the
            number of actions; see also :func:`~blueberry_video.inference.frame_generation.generate_frames`.

    Example::

        >>> from blueberry_video.inference.video_generation import stream_video
        >>> from blueberry_video.models.hydra_video.generator import HydraVideoGenerator
        >>> from blueberry_video.models.hydra_video.quantizers import FSQ
        >>> from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer
        >>> sizes = {"dims": [8], "depths": [0], "pools": [], "head_dim": 8, "state_dim": 4}
        >>> tokenizer = HydraVideoTokenizer(FSQ([4, 4]), image_size=8, patch_size=(2, 4), **sizes)
        >>> model = HydraVideoGenerator(16, (2, 2), embed_dim=16, depth=1, head_dim=8, state_dim=4)
        >>> [tuple(part.shape) for part in stream_video(model, tokenizer, num_frames=5, generator=[0])]
        [(1, 3, 1, 8, 8), (1, 3, 2, 8, 8), (1, 3, 2, 8, 8)]
    """
    side, step = tokenizer.image_size, tokenizer.frame_step
    grid = tokenizer.grid(1, side, side)[1:]
    if (tokenizer.vocabulary, grid) != (model.vocabulary, model.grid):
        raise ValueError(
            f"vocabulary={model.vocabulary} and grid={model.grid} of the generator must equal those of the tokenizer, "
            f"vocabulary={tokenizer.vocabulary} and grid={grid}: use the tokenizer of its training."
        )
    known = 0 if prompt is None else _checked_prompt(tokenizer, prompt)  # frames of tokens
    if prompt_actions is not None and prompt_actions.shape[1] != max(known - 1, 0):
        raise ValueError(
            f"prompt_actions has {prompt_actions.shape[1]} per clip, but the prompt has {known} frames of tokens: pass "
            f"{max(known - 1, 0)}, one per frame but the first."
        )
    count = None
    if num_frames is not None:
        tokenizer.check(num_frames, side, side)
        count = 1 + (num_frames - 1) // step - known
        if count < 1:
            raise ValueError(
                f"num_frames={num_frames} includes the {1 + (known - 1) * step} frames of the prompt: use at least "
                f"{1 + known * step}."
            )
        if actions is not None and actions.shape[1] != (expected := count - (not known)):
            fitting = 1 + (actions.shape[1] + max(known, 1) - 1) * step
            raise ValueError(
                f"actions has {actions.shape[1]} per clip, but num_frames={num_frames} requires {expected}, one per "
                f"generated frame of tokens{'' if known else ' but the first'}: use num_frames={fitting}, or pass "
                f"{expected} actions."
            )
    first = encoded = None
    if prompt is not None:
        prompt = prompt.to(tokenizer.to_code.weight)
        first, encoded = tokenizer.encode_stream(prompt[:, :, :1])
    frames = generate_frames(model, conditioning, count, decoding, first, actions, None, generator, num_clips)
    return _decoded(frames, tokenizer, first, encoded, prompt, prompt_actions)


def _decoded(
    frames: FrameStream,
    tokenizer: HydraVideoTokenizer,
    first: Tensor | None,
    encoded: tuple | None,
    prompt: Tensor | None,
    prompt_actions: Tensor | None,
) -> Iterator[Tensor]:
    """Yields the pixels of the prompt and of the generated frames.

    Args:
        first, encoded: Tokens (B, 1, h, w) of the first frame, which is committed, and the state of the encoder.
    """
    state, step = None, tokenizer.frame_step
    if first is not None and prompt is not None:
        video, state = tokenizer.decode_stream(first)
        yield video
        for index, start in enumerate(range(1, prompt.shape[2], step)):
            ids, encoded = tokenizer.encode_stream(prompt[:, :, start : start + step], encoded)
            frames.commit(ids, None if prompt_actions is None else prompt_actions[:, index : index + 1])
            video, state = tokenizer.decode_stream(ids, state)
            yield video
    for frame in frames:
        video, state = tokenizer.decode_stream(frame[:, None], state)
        yield video


def _checked_prompt(tokenizer: HydraVideoTokenizer, prompt: Tensor) -> int:
    """Returns the number of frames of tokens of a prompt (B, 3, T, H, W)."""
    side = tokenizer.image_size
    if prompt.ndim != 5 or prompt.shape[1] != 3 or tuple(prompt.shape[3:]) != (side, side):
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}: it must be (B, 3, T, {side}, {side}), the image_size={side} of "
            "the tokenizer."
        )
    try:
        tokenizer.check(prompt.shape[2], side, side)
    except ValueError as error:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: {error}") from error
    return 1 + (prompt.shape[2] - 1) // tokenizer.frame_step
