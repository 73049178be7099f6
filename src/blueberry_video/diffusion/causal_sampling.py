"""Clips that are made chunk by chunk, by a transformer that is causal in time (Diffusion Forcing, arXiv 2407.01392;
CausVid, arXiv 2412.07772).

A chunk is denoised while the frames before it stand at time 0, and then stays as it is. With a cache the network
evaluates the frames of one chunk only, as often as the sampler has steps, and once more when they are clean, to write
the keys and values that later chunks see. Without one it evaluates all frames so far every time, and says the same.
"""

from typing import Protocol

import torch
from torch import Tensor

from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Sampler
from blueberry_video.nn.joint_attention import KeyValueCache


class CausalNetwork(Protocol):
    """A causal transformer with its text: ``functools.partial(transformer, text=…, text_mask=…, pooled=…)``."""

    def __call__(
        self, latents: Tensor, time: Tensor, /, *, cache: KeyValueCache | None, first_frame: int
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
    generator: torch.Generator | None = None,
    cached: bool = True,
) -> Tensor:
    """Samples clean latents, ``chunk`` frames after the other.

    Args:
        conditional, unconditional: the network with the text and without; the second may be ``None`` where the
            guidance does not need it.
        noise: (B, C, T, H, W), standard normal.
        chunk: frames that are denoised together: the network's ``causal_chunk``. The last chunk may be shorter.
        sampler, guidance, objective: as for other samples.
        history: (B, C, T0, H, W), clean latents that the clip goes on from; T0 is a multiple of ``chunk``.
        generator: of the noise that a stochastic sampler adds.
        cached: whether to keep keys and values. Otherwise the same is computed with the whole mask.

    Returns:
        (B, C, T, H, W): the new frames.

    Raises:
        ValueError: for a chunk below 1, noise or a history of another shape, or a history that ends within a chunk.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk has 1 frame or more, as many as the network's causal_chunk.")
    if noise.ndim != 5:
        raise ValueError(f"noise of shape {tuple(noise.shape)}: latents are (B, C, T, H, W).")
    finished = noise[:, :, :0] if history is None else history.to(noise.dtype)
    if (*finished.shape[:2], *finished.shape[3:]) != (*noise.shape[:2], *noise.shape[3:]):
        raise ValueError(f"history of {tuple(finished.shape)} for noise of {tuple(noise.shape)}: only T may differ.")
    if finished.shape[2] % chunk:
        raise ValueError(
            f"history of {finished.shape[2]} frames ends within a chunk of {chunk}: give a multiple of {chunk} frames."
        )
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
    """The network as a sampler asks it: about the frames that follow those that are finished."""

    def __init__(self, network: CausalNetwork, objective: Objective, cached: bool):
        self._network, self._objective = network, objective
        self._cache = KeyValueCache() if cached else None
        self._finished: list[Tensor] = []

    def append(self, frames: Tensor) -> None:
        """Clean frames (B, C, T, H, W) that follow; of none, nothing happens."""
        if not frames.shape[2]:
            return
        if self._cache is not None:
            self._network(frames, self._time(frames, 0.0), cache=self._cache, first_frame=self._num_finished)
        self._finished.append(frames)

    def __call__(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The output (B, C, T, H, W) for the next frames, at times ``t`` (B,)."""
        time = self._objective.network_timestep(t)[:, None].expand(-1, noisy.shape[2])
        before = self._num_finished
        if self._cache is not None:
            return self._network(noisy, time, cache=self._cache, first_frame=before)
        clean = [frames.to(noisy.dtype) for frames in self._finished]
        times = [self._time(frames, 0.0) for frames in self._finished]
        output = self._network(
            torch.cat([*clean, noisy], dim=2), torch.cat([*times, time], 1), cache=None, first_frame=0
        )
        return output[:, :, before:]

    @property
    def _num_finished(self) -> int:
        return sum(frames.shape[2] for frames in self._finished)

    def _time(self, frames: Tensor, t: float) -> Tensor:
        times = torch.full((frames.shape[0], frames.shape[2]), t, device=frames.device)
        return self._objective.network_timestep(times)
