"""Continuation of a video of tokens along given actions, optionally with a loss of memory at one frame."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from blueberry_video.inference.frame_generation import FrameDecoding, Generators, generate_frames
from blueberry_video.models.hydra_video.generator import HydraVideoGenerator


@dataclass(frozen=True)
class Rollout:
    """Generates the frames after a prompt, without labels and text.

    Args:
        decoding: Settings of the decoding of a frame.
    """

    decoding: FrameDecoding = field(default_factory=FrameDecoding)

    def __call__(
        self,
        model: HydraVideoGenerator,
        prompt_ids: Tensor,
        actions: Tensor,
        reset_at: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Generates n frames, of which the first t are the prompt.

        Args:
            model: Trained generator with actions.
            prompt_ids: (B, t, h, w) long, t at least 1.
            actions: (B, n - 1) or (B, n - 1, k) long, those that lead to each frame but the first.
            reset_at: Frame of tokens, 1 to n - 1, before which the states of the model are reset, so that it and the
                frames after it do not depend on those before; ``None`` for none. Prompt frames before it are unused.
            generator: One generator or seed per clip, or see
                :func:`~blueberry_video.inference.frame_generation.generate_frames`.

        Returns:
            Tokens (B, n, h, w) long.

        Raises:
            ValueError: For a prompt of n frames or more, a ``reset_at`` out of range, or actions that do not fit the
                model.
        """
        (batch, known), total = prompt_ids.shape[:2], actions.shape[1] + 1
        if known >= total:
            raise ValueError(f"the prompt has {known} frames, but {total - 1} actions are for {total}: shorten it.")
        if reset_at is not None and not 1 <= reset_at < total:
            raise ValueError(f"reset_at={reset_at} must be 1 to {total - 1}, a frame after the first.")
        stream = generate_frames(model, decoding=self.decoding, generator=generator, num_clips=batch)
        if reset_at is None or reset_at >= known:
            stream.commit(prompt_ids, actions[:, : known - 1])
        else:
            stream.reset()
            stream.commit(prompt_ids[:, reset_at:], actions[:, reset_at - 1 : known - 1])
        frames = []
        for frame in range(known, total):
            if frame == reset_at:
                stream.reset()
            frames.append(stream.step(actions[:, frame - 1]))
        return torch.cat([prompt_ids.to(frames[0]), torch.stack(frames, dim=1)], dim=1)
