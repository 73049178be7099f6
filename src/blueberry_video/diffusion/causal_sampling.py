"""Chunk-wise sampling with transformers that are causal in time (Diffusion Forcing, arXiv 2407.01392; CausVid, arXiv
2412.07772).

A chunk is denoised while earlier frames have timestep 0, and is then final. With a KV cache, the network evaluates only
the frames of one chunk, once per sampler step and once more when they are clean, to fill the cache for later chunks.
Without a cache it evaluates all frames so far in every step; the samples are equal.

Videos longer than the clips of training have a rolling KV cache: before each chunk, it is computed again from the last
frames, as many as fit a window of the length in training, as the first frames of a clip. So memory and time per chunk
are constant, and all positions, of the video and relative to the text, are those of training; without the last, rotated
keys could stay in the cache, and added position embeddings could not.
"""

from typing import Protocol

import torch
from torch import Tensor

from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Sampler
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.nn.noise import Generator


class CausalNetwork(Protocol):
    """Causal transformer with bound text: ``functools.partial(transformer, text=…, text_mask=…, pooled=…)``."""

    def __call__(
        self, latents: Tensor, timestep: Tensor, /, *, cache: KeyValueCache | None, first_frame: int
    ) -> Tensor: ...


@torch.no_grad()
def generate_causally(
    conditional: CausalNetwork,
    unconditional: CausalNetwork | None,
    noise: Tensor,
    chunk: int | None,
    sampler: Sampler,
    guidance: Guidance,
    objective: Objective,
    history: Tensor | None = None,
    generator: Generator = None,
    cached: bool = True,
    window: int | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Samples clean latents chunk by chunk.

    Args:
        conditional, unconditional: network with and without the text; the latter may be ``None`` if the guidance does
            not require it.
        noise: (B, C, T, H, W), standard normal.
        chunk: frames per chunk, the network's ``causal_chunk``. The last chunk may be shorter. ``None`` for a network
            with full attention and a timestep per frame: all new frames are one chunk, without a cache.
        sampler, guidance, objective: as for non-causal sampling.
        history: clean latents (B, C, T0, H, W) that the clip continues; T0 is a multiple of ``chunk``.
        generator: generator of the noise of a stochastic sampler, or one per clip.
        cached: use a KV cache instead of the whole attention mask.
        window: frames that the network receives at most, those of a chunk included; ``None`` for all.
        start, strength: clean latents (B, C, T, H, W) and share of the steps, see :class:`.samplers.Sampler`.

    Returns:
        New frames (B, C, T, H, W).

    Raises:
        ValueError: for a chunk below 1, noise, history or start of an invalid shape, a history that ends within a
            chunk, or a window of less than two chunks.
    """
    if chunk is None:
        chunk, cached, whole = max(noise.shape[2], 1), False, 1
    else:
        whole = chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 frame, the causal_chunk of the network.")
    if noise.ndim != 5:
        raise ValueError(f"noise of shape {tuple(noise.shape)} must be (B, C, T, H, W).")
    finished = noise[:, :, :0] if history is None else history.to(noise.dtype)
    if (*finished.shape[:2], *finished.shape[3:]) != (*noise.shape[:2], *noise.shape[3:]):
        raise ValueError(f"history of {tuple(finished.shape)} for noise of {tuple(noise.shape)}: only T may differ.")
    if finished.shape[2] % whole:
        raise ValueError(f"history of {finished.shape[2]} frames must be a multiple of chunk={chunk} frames.")
    if start is not None and start.shape != noise.shape:
        raise ValueError(f"start of {tuple(start.shape)} must have the shape of the noise, {tuple(noise.shape)}.")
    if window is not None and window < 2 * chunk:
        raise ValueError(
            f"window={window} frames must be at least {2 * chunk}, two chunks of {chunk} frames: a chunk continues at "
            "least one."
        )
    kept = None if window is None else (window // chunk - 1) * chunk
    with_text = _Continuation(conditional, objective, cached, kept)
    without = None
    if guidance.unconditional and unconditional:
        without = _Continuation(unconditional, objective, cached, kept)
    denoise = guidance(with_text, without, objective, sampler.steps)
    new = []
    for index, part in enumerate(noise.split(chunk, dim=2)):
        for continuation in filter(None, (with_text, without)):
            continuation.append(finished)
        begin = None if start is None else start[:, :, index * chunk : index * chunk + part.shape[2]]
        finished = sampler(denoise, part, objective, generator, begin, strength)
        new.append(finished)
    return torch.cat(new, dim=2)


class _Continuation:
    """Causal network as a function of the frames that follow the finished frames, for samplers.

    Args:
        network, objective, cached: see :func:`generate_causally`.
        kept: finished frames that the network receives at most; ``None`` for all.
    """

    def __init__(self, network: CausalNetwork, objective: Objective, cached: bool, kept: int | None = None):
        self._network, self._objective, self._kept = network, objective, kept
        self._cache = KeyValueCache() if cached else None
        self._finished: Tensor | None = None

    def append(self, frames: Tensor) -> None:
        """Appends clean frames (B, C, T, H, W) to the finished frames and to the KV cache; T may be 0.

        If there are more frames than are kept, the cache is computed again from the last ones.
        """
        if not frames.shape[2]:
            return
        held = self._num_finished
        self._finished = frames if self._finished is None else torch.cat([self._finished.to(frames), frames], dim=2)
        if self._kept is not None and self._num_finished > self._kept:
            self._finished = frames = self._finished[:, :, -self._kept :]
            held = 0
        if self._cache is not None:
            self._network(frames, self._zero_timesteps(frames), cache=self._cache, first_frame=held)

    def __call__(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns the output (B, C, T, H, W) for the next frames at timesteps ``t`` (B,)."""
        timestep = self._objective.network_timestep(t)[:, None].expand(-1, noisy.shape[2])
        if self._cache is not None:
            return self._network(noisy, timestep, cache=self._cache, first_frame=self._num_finished)
        if self._finished is None:
            return self._network(noisy, timestep, cache=None, first_frame=0)
        latents = torch.cat([self._finished.to(noisy.dtype), noisy], dim=2)
        timesteps = torch.cat([self._zero_timesteps(self._finished), timestep], dim=1)
        return self._network(latents, timesteps, cache=None, first_frame=0)[:, :, self._num_finished :]

    @property
    def _num_finished(self) -> int:
        return 0 if self._finished is None else self._finished.shape[2]

    def _zero_timesteps(self, frames: Tensor) -> Tensor:
        """Returns the network timesteps (B, T) of clean frames."""
        return self._objective.network_timestep(torch.zeros(frames.shape[0], frames.shape[2], device=frames.device))
