"""Chunk-wise sampling with transformers that are causal in time (Diffusion Forcing, arXiv 2407.01392; CausVid, arXiv
2412.07772).

A chunk is denoised while earlier frames have timestep 0, and is then final. With a KV cache, the network evaluates only
the frames of one chunk, once per sampler step and once more when they are clean, to fill the cache for later chunks.
Without a cache it evaluates all frames so far in every step; the samples are equal.
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
    chunk: int,
    sampler: Sampler,
    guidance: Guidance,
    objective: Objective,
    history: Tensor | None = None,
    generator: Generator = None,
    cached: bool = True,
) -> Tensor:
    """Samples clean latents chunk by chunk.

    Args:
        conditional, unconditional: network with and without the text; the latter may be ``None`` if the guidance does
            not require it.
        noise: (B, C, T, H, W), standard normal.
        chunk: frames per chunk, the network's ``causal_chunk``. The last chunk may be shorter.
        sampler, guidance, objective: as for non-causal sampling.
        history: clean latents (B, C, T0, H, W) that the clip continues; T0 is a multiple of ``chunk``.
        generator: generator of the noise of a stochastic sampler, or one per clip.
        cached: use a KV cache instead of the whole attention mask.

    Returns:
        New frames (B, C, T, H, W).

    Raises:
        ValueError: for a chunk below 1, noise or history of an invalid shape, or a history that ends within a chunk.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 frame, the causal_chunk of the network.")
    if noise.ndim != 5:
        raise ValueError(f"noise of shape {tuple(noise.shape)} must be (B, C, T, H, W).")
    finished = noise[:, :, :0] if history is None else history.to(noise.dtype)
    if (*finished.shape[:2], *finished.shape[3:]) != (*noise.shape[:2], *noise.shape[3:]):
        raise ValueError(f"history of {tuple(finished.shape)} for noise of {tuple(noise.shape)}: only T may differ.")
    if finished.shape[2] % chunk:
        raise ValueError(f"history of {finished.shape[2]} frames must be a multiple of chunk={chunk} frames.")
    with_text = _Continuation(conditional, objective, cached)
    without = _Continuation(unconditional, objective, cached) if guidance.unconditional and unconditional else None
    denoise = guidance(with_text, without, objective, sampler.steps)
    new = []
    for part in noise.split(chunk, dim=2):
        for continuation in filter(None, (with_text, without)):
            continuation.append(finished)
        finished = sampler(denoise, part, objective, generator)
        new.append(finished)
    return torch.cat(new, dim=2)


class _Continuation:
    """Causal network as a function of the frames that follow the finished frames, for samplers."""

    def __init__(self, network: CausalNetwork, objective: Objective, cached: bool):
        self._network, self._objective = network, objective
        self._cache = KeyValueCache() if cached else None
        self._finished: list[Tensor] = []

    def append(self, frames: Tensor) -> None:
        """Appends clean frames (B, C, T, H, W) to the finished frames and to the KV cache; T may be 0."""
        if not frames.shape[2]:
            return
        if self._cache is not None:
            self._network(frames, self._zero_timesteps(frames), cache=self._cache, first_frame=self._num_finished)
        self._finished.append(frames)

    def __call__(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns the output (B, C, T, H, W) for the next frames at timesteps ``t`` (B,)."""
        timestep = self._objective.network_timestep(t)[:, None].expand(-1, noisy.shape[2])
        if self._cache is not None:
            return self._network(noisy, timestep, cache=self._cache, first_frame=self._num_finished)
        latents = torch.cat([*(frames.to(noisy.dtype) for frames in self._finished), noisy], dim=2)
        timesteps = torch.cat([*map(self._zero_timesteps, self._finished), timestep], dim=1)
        return self._network(latents, timesteps, cache=None, first_frame=0)[:, :, self._num_finished :]

    @property
    def _num_finished(self) -> int:
        return sum(frames.shape[2] for frames in self._finished)

    def _zero_timesteps(self, frames: Tensor) -> Tensor:
        """Returns the network timesteps (B, T) of clean frames."""
        return self._objective.network_timestep(torch.zeros(frames.shape[0], frames.shape[2], device=frames.device))
