"""Output of a trained task for clips without labels.

Shapes: B clips of T x H x W pixels; N tokens of D channels.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from blueberry_video.evaluation.reference import clip_seeds
from blueberry_video.inference.reconstruction import hide, reconstruct
from blueberry_video.masking import evaluation_masks
from blueberry_video.models.encoder import Encoder
from blueberry_video.tasks.action_prediction import ActionPrediction
from blueberry_video.tasks.anticipation import Anticipation
from blueberry_video.tasks.autoencoding import Autoencoding
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.depth import Depth
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.frame_classification import FrameClassification
from blueberry_video.tasks.frame_generation import FrameGeneration
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.tokenization import Tokenization

Outputs = dict[str, Tensor]


@torch.no_grad()
def predict(task: Any, batch: dict[str, Any]) -> Outputs:
    """Returns the outputs of a trained task in evaluation mode.

    Args:
        task: the task, on the device of the batch.
        batch: ``video`` float (B, 3, T, H, W) in [0, 1] and ``id``, a name per clip; ``frames`` (B, T) for models with
            segments, ``actions`` and ``states`` for world models.

    Returns:
        By kind of task:

        - classification, distillation, anticipation: label -> probabilities (B, classes), at every time step
          (B, t, classes) for a classifier of frames;
        - masked pixels: ``features`` (B, N, D) of the encoder for the whole clip, and ``reconstruction``
          (B, 3, T, H, W) in [0, 1] from the visible patches of its validation mask, with the mean and deviation of the
          true patches; ``visible`` (B, 3, T, H, W), 1 at pixels of visible patches and 0 at the rest;
        - latent prediction, action prediction: ``features`` of the target encoder, or of the encoder;
        - autoencoding: ``latents`` (B, C, t, h, w), the means, and ``reconstruction``; tokenization: ``tokens``
          (B, t, h, w) and ``reconstruction``; generation of frames: the same of its tokenizer; diffusion: the same as
          autoencoding, of its autoencoder;
        - depth: ``depth`` (B, T, H, W) in meters, or ``disparity`` of unknown scale and shift.

    Raises:
        ValueError: for a task without such an output, or clips that its model rejects.
    """
    for kind, function in KINDS.items():
        if isinstance(task, kind):
            return function(task, batch)
    raise ValueError(f"{type(task).__name__} has no output for a clip: a trained scene is rendered, see `make render`.")


def features(task: Any, batch: dict[str, Any]) -> Tensor:
    """Returns the tokens (B, N, D) of the encoder of a task for whole clips; see :func:`predict`.

    Raises:
        ValueError: the model has no encoder.
    """
    if isinstance(task, ActionPrediction):
        return task.model.encode_frames(task.normalize(batch["video"])).flatten(1, 2)
    return encoder_of(task)(task.normalize(batch["video"]))


def encoder_of(task: Any) -> Encoder:
    """Returns the encoder of a task: the target encoder, where the task trains one.

    Raises:
        ValueError: the model has no encoder.
    """
    model = task.model
    if isinstance(task, LatentPrediction):
        return cast(Encoder, model.target_encoder or model.encoder)
    encoder = getattr(model, "pretrained" if isinstance(task, Depth) else "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"model={type(model).__name__} has no encoder of clips, so it has no features.")
    return encoder


def _classes(task: Any, batch: dict[str, Any]) -> Outputs:
    frames = (batch["frames"],) if "frames" in batch else ()
    logits = task.model(task.normalize(batch["video"]), *frames)
    return {label: scores.float().softmax(dim=-1) for label, scores in logits.items()}


def _anticipated(task: Anticipation, batch: dict[str, Any]) -> Outputs:
    gap = torch.full((len(batch["video"]),), task.val_gap, device=batch["video"].device)
    seen = batch["video"][:, :, -task.seen :]
    logits = task.model(task.normalize(seen), gap // task.model.encoder.patch_size[0])
    return {label: scores.float().sigmoid() for label, scores in logits.items()}  # trained as binary problems


def _masked(task: MaskedPixels, batch: dict[str, Any]) -> Outputs:
    video, encoder = batch["video"], task.model.encoder
    keep, target, _ = evaluation_masks(task.masking, clip_seeds(batch), encoder.grid(video.shape)).to(video.device)
    made = reconstruct(task.model, video, task.normalize(video), keep, target, task.normalize_over)
    return {
        "features": features(task, batch),
        "reconstruction": made,
        "visible": hide(encoder, torch.ones_like(video), keep),
    }


def _encoded(task: Any, batch: dict[str, Any]) -> Outputs:
    return {"features": features(task, batch)}


def _autoencoded(task: Any, batch: dict[str, Any]) -> Outputs:
    autoencoder = task.model
    if isinstance(task, Diffusion):
        if (autoencoder := task.model.autoencoder) is None:
            raise ValueError("model.autoencoder=null: the run was trained on stored latents, and encodes no videos.")
        task.model.prepare(task.device)
        autoencoder = task.model.autoencoder
    latents = autoencoder.encode(batch["video"] * 2 - 1).chunk(2, dim=1)[0]
    return {"latents": latents, "reconstruction": _pixels(autoencoder.decode(autoencoder.normalize(latents)))}


def _tokenized(task: Any, batch: dict[str, Any]) -> Outputs:
    tokenizer = task.tokenizer.to(task.device) if isinstance(task, FrameGeneration) else task.model
    ids = tokenizer.encode_ids(batch["video"] * 2 - 1)
    return {"tokens": ids, "reconstruction": _pixels(tokenizer.decode_ids(ids))}


def _depth(task: Depth, batch: dict[str, Any]) -> Outputs:
    return {"depth" if task.metric else "disparity": task.predict(batch["video"])}


def _pixels(video: Tensor) -> Tensor:
    return (video.float().clamp(-1, 1) + 1) / 2


KINDS: dict[type, Callable[[Any, dict[str, Any]], Outputs]] = {
    Classification: _classes,
    FrameClassification: _classes,
    Anticipation: _anticipated,
    MaskedPixels: _masked,
    LatentPrediction: _encoded,
    ActionPrediction: _encoded,
    Autoencoding: _autoencoded,
    Diffusion: _autoencoded,
    Tokenization: _tokenized,
    FrameGeneration: _tokenized,
    Depth: _depth,
}
RECONSTRUCTS = (MaskedPixels, Autoencoding, Diffusion, Tokenization, FrameGeneration)  # with ``reconstruction``
