"""Parity of VideoMAE with transformers, and of its loss with a reference in loops.

The references are tiny and random in **every** parameter: transformers initializes biases to 0 and norms to 1, which
would hide a dropped one.
"""

import argparse
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from blueberry_video.models import classifier, vit
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD
from blueberry_video.tasks.masked_pixels import masked_pixel_loss

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off of a few layers; a dropped bias changes outputs by 1e-2

# use_mean_pooling is transformers' name for "no LayerNorm after the encoder".
CONFIGS = {
    "final-norm": {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "use_mean_pooling": False},
    "no-final-norm": {
        "image_size": 24,
        "patch_size": 8,
        "num_frames": 8,
        "tubelet_size": 2,
        "use_mean_pooling": True,
        "num_hidden_layers": 3,
    },
    "odd-sizes": {
        "image_size": 12,
        "patch_size": 4,
        "num_frames": 3,
        "tubelet_size": 1,
        "use_mean_pooling": False,
        "hidden_size": 47,
        "num_attention_heads": 1,
        "intermediate_size": 61,
        "decoder_hidden_size": 24,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 96,
        "decoder_num_hidden_layers": 3,
    },
    "no-qkv-bias": {
        "image_size": 16,
        "patch_size": 4,
        "num_frames": 2,
        "tubelet_size": 2,
        "use_mean_pooling": True,
        "qv_bias": False,
    },
    "one-channel": {
        "image_size": 16,
        "patch_size": 8,
        "num_frames": 8,
        "tubelet_size": 4,
        "use_mean_pooling": False,
        "num_channels": 1,
    },
}


def hf_config(name: str, **changes) -> VideoMAEConfig:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "decoder_hidden_size": 24,
        "decoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 96,
        "layer_norm_eps": 1e-6,
    }
    return VideoMAEConfig(**(small | CONFIGS[name] | changes))


def randomized(reference: nn.Module) -> nn.Module:
    """Reference with random parameters and the original's LayerNorm eps; transformers uses 1e-5 in some layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm_scale else 0.2 * noise)
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return reference.eval()


def clips_and_masks(config: VideoMAEConfig, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Video (B, C, T, H, W) in [0, 1], the normalized video, and random masks that differ between samples."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_channels, config.num_frames, config.image_size, config.image_size)
    video = torch.rand(shape, generator=generator)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    inputs = (video - mean) / std if config.num_channels == 3 else video  # transformers un-normalizes only RGB
    tokens = (config.num_frames // config.tubelet_size) * (config.image_size // config.patch_size) ** 2
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    hidden = int(0.75 * tokens)
    return video, inputs, order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values


def hf_forward(reference: nn.Module, inputs: Tensor, target: Tensor):
    tokens = reference.videomae.embeddings.num_patches
    masked = torch.zeros(len(inputs), tokens, dtype=torch.bool).scatter(1, target, True)
    return reference(pixel_values=inputs.transpose(1, 2), bool_masked_pos=masked)


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under the original repository's names, independent of the package's conversion."""
    renames = (
        (r"^videomae\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
        (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
        (r"^videomae\.layernorm\.", "encoder.norm."),
        (r"^decoder\.decoder_layers\.", "decoder.blocks."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.attention\.query\.bias$", ".attn.q_bias"),
        (r"\.attention\.attention\.value\.bias$", ".attn.v_bias"),
        (r"^classifier\.", "head."),
    )
    original = {}
    for name, value in state.items():
        if name.endswith((".key.weight", ".value.weight")):
            continue
        if name.endswith(".query.weight"):
            value = torch.cat([value, state[name.replace("query", "key")], state[name.replace("query", "value")]])
            name = name.replace(".attention.attention.query.", ".attn.qkv.")
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        original[name] = value
    return original


def before_version_5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict under transformers' names before version 5, as in the files on the hub."""
    return {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v for name, v in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def without_encoder_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): value for name, value in state.items()}


def write(folder: Path, layout: str, state: dict[str, Tensor]) -> Path:
    """Writes ``state``, under transformers' names, to a file in layout ``layout``."""
    original = to_original(state)
    contents = {
        "huggingface.safetensors": state,
        "huggingface.bin": state,
        "huggingface-4.safetensors": before_version_5(state),
        "huggingface-4.bin": before_version_5(state),
        "original.pth": {"model": original, "epoch": 799, "args": argparse.Namespace(lr=1e-3, mask_type="tube")},
        "original-bare.pth": original,
        "deepspeed.pt": {"module": original, "global_steps": 3},
        "data-parallel.pth": {"model": prefixed("module.", original)},
        "lightning.ckpt": {"state_dict": prefixed("model.", original), "global_step": 3},
        "finetuned.pth": {"model": without_encoder_prefix(original)},
        "finetuned-deepspeed.pt": {"module": without_encoder_prefix(original)},
        "finetuned-backbone.pth": {"model": prefixed("backbone.", without_encoder_prefix(original))},
    }
    path = folder / layout
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in contents[layout].items()}, path)
    else:
        torch.save(contents[layout], path)
    return path


SHARED_LAYOUTS = ["huggingface.safetensors", "huggingface.bin", "huggingface-4.safetensors", "huggingface-4.bin"]
PRETRAINED_LAYOUTS = [
    *SHARED_LAYOUTS,
    "original.pth",
    "original-bare.pth",
    "deepspeed.pt",
    "data-parallel.pth",
    "lightning.ckpt",
]
FINETUNED_LAYOUTS = [*SHARED_LAYOUTS, "finetuned.pth", "finetuned-deepspeed.pt", "finetuned-backbone.pth"]


def load_pretrained(path: Path, config: VideoMAEConfig) -> MaskedAutoencoder:
    heads, decoder_heads = config.num_attention_heads, config.decoder_num_attention_heads
    return MaskedAutoencoder.from_published(path, config.num_frames, config.image_size, heads, decoder_heads)


def load_finetuned(path: Path, config: VideoMAEConfig) -> classifier.VideoClassifier:
    return classifier.VideoClassifier.from_published(
        path, "action", config.num_frames, config.image_size, config.num_attention_heads
    )


def assert_same_gradients(ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Compares each gradient to 1e-5 of its largest entry, since most gradients are far smaller than 1."""
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        largest = theirs[name].abs().max()
        assert largest > 1e-6, f"{name} has no gradient to compare"
        assert (gradient - theirs[name]).abs().max() <= 1e-5 * min(largest, 1.0), name


@pytest.mark.parametrize("name", CONFIGS)
def test_pretraining_equals_transformers_in_output_loss_and_all_gradients(name, tmp_path):
    config = hf_config(name)
    reference = randomized(VideoMAEForPreTraining(config))
    ours = load_pretrained(write(tmp_path, "huggingface.safetensors", reference.state_dict()), config)
    video, inputs, keep, target = clips_and_masks(config)

    theirs = hf_forward(reference, inputs, target)
    predicted = ours(inputs, keep, target)
    loss = masked_pixel_loss(predicted, video, target, ours.encoder.patch_size)
    torch.testing.assert_close(predicted, theirs.logits, **TOLERANCE)
    torch.testing.assert_close(loss, theirs.loss, **TOLERANCE)

    theirs.loss.backward()
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert_same_gradients(ours, to_original(gradients))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_classification_equals_transformers_in_output_loss_and_all_gradients(name, mean, tmp_path):
    """``use_mean_pooling=False`` normalizes the tokens in the encoder and classifies the first one."""
    config = hf_config(name, use_mean_pooling=mean, num_labels=5)
    reference = randomized(VideoMAEForVideoClassification(config))
    ours = load_finetuned(write(tmp_path, "huggingface.safetensors", reference.state_dict()), config)
    _, inputs, _, _ = clips_and_masks(config)
    labels = torch.tensor([3, 1])

    theirs = reference(pixel_values=inputs.transpose(1, 2), labels=labels)
    logits = ours(inputs)["action"]
    loss = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(logits, theirs.logits, **TOLERANCE)
    torch.testing.assert_close(loss, theirs.loss, **TOLERANCE)

    theirs.loss.backward()
    loss.backward()
    gradients = {}
    for key, value in to_original({key: p.grad for key, p in reference.named_parameters()}).items():
        key = re.sub(r"^head\.", "head.linear.action.", key)
        gradients[re.sub(r"^fc_norm\.", "head.fc_norm.", key)] = value
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("layout", PRETRAINED_LAYOUTS)
def test_every_layout_of_a_pretrained_file_loads_the_same_model(layout, tmp_path):
    config = hf_config("final-norm")
    reference = randomized(VideoMAEForPreTraining(config))
    path = write(tmp_path, layout, reference.state_dict())
    _, inputs, keep, target = clips_and_masks(config)
    with torch.no_grad():
        expected = hf_forward(reference, inputs, target).logits
        torch.testing.assert_close(load_pretrained(path, config)(inputs, keep, target), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["no-final-norm", "final-norm"])
@pytest.mark.parametrize("layout", FINETUNED_LAYOUTS)
def test_every_layout_of_a_finetuned_file_loads_the_same_model(layout, name, tmp_path):
    config = hf_config(name, num_labels=5)
    reference = randomized(VideoMAEForVideoClassification(config))
    path = write(tmp_path, layout, reference.state_dict())
    _, inputs, _, _ = clips_and_masks(config)
    with torch.no_grad():
        expected = reference(pixel_values=inputs.transpose(1, 2)).logits
        torch.testing.assert_close(load_finetuned(path, config)(inputs)["action"], expected, **TOLERANCE)


@pytest.mark.parametrize("layout", [*PRETRAINED_LAYOUTS, "finetuned-backbone.pth"])
def test_encoder_loads_from_every_layout(layout, tmp_path):
    config = hf_config("final-norm")
    reference = randomized(VideoMAEForPreTraining(config))
    state = reference.state_dict()
    if layout == "finetuned-backbone.pth":
        state = {name: value for name, value in state.items() if name.startswith("videomae.")}
    encoder = vit.VisionTransformer(16, 4, 8, 2, embed_dim=32, depth=2, num_heads=4)
    encoder.load_published(write(tmp_path, layout, state))
    _, inputs, _, _ = clips_and_masks(config)
    with torch.no_grad():
        expected = reference.videomae(inputs.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(encoder(inputs), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "part",
    [
        r"videomae\..*query\.bias",
        r"videomae\..*value\.bias",
        r"decoder\..*query\.bias",
        r"decoder\..*value\.bias",
        r"projection\.bias",
        r"layernorm_before\.bias",
        r"layernorm_after\.bias",
        r"videomae\.layernorm\.bias",
        r"attention\.output\.dense\.bias",
        r"intermediate\.dense\.bias",
        r"decoder\.norm\.bias",
        r"decoder\.head\.bias",
        r"mask_token",
    ],
)
def test_dropped_bias_exceeds_the_tolerance(part, tmp_path):
    """Zeroing one kind of bias in the file moves the output far above the tolerance of the parity tests."""
    config = hf_config("final-norm")
    reference = randomized(VideoMAEForPreTraining(config))
    state = reference.state_dict()
    zeroed = {name: torch.zeros_like(v) if re.search(part, name) else v for name, v in state.items()}
    path = write(tmp_path, "huggingface.safetensors", zeroed)
    _, inputs, keep, target = clips_and_masks(config)
    with torch.no_grad():
        difference = load_pretrained(path, config)(inputs, keep, target) - hf_forward(reference, inputs, target).logits
    assert difference.abs().max() > 1e-3


def loss_in_loops(predicted: Tensor, video: Tensor, target: Tensor, patch_size: tuple[int, int, int]) -> float:
    """Reference of the original's loss, in float64."""
    predicted, video = predicted.double(), video.double()
    pt, ph, pw = patch_size
    channels, height, width = video.shape[1], video.shape[3] // ph, video.shape[4] // pw
    total, count = 0.0, 0
    for b in range(len(video)):
        for n, token in enumerate(target[b].tolist()):
            t, rest = divmod(token, height * width)
            i, j = divmod(rest, width)
            for c in range(channels):
                pixels = [
                    video[b, c, t * pt + dt, i * ph + di, j * pw + dj].item()
                    for dt in range(pt)
                    for di in range(ph)
                    for dj in range(pw)
                ]
                mean = sum(pixels) / len(pixels)
                std = (sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)) ** 0.5
                for p, pixel in enumerate(pixels):
                    total += (predicted[b, n, p * channels + c].item() - (pixel - mean) / (std + 1e-6)) ** 2
                    count += 1
    return total / count


@pytest.mark.parametrize("patch_size", [(2, 4, 4), (1, 2, 8), (4, 8, 2)])
def test_loss_equals_the_formula_in_loops(patch_size):
    generator = torch.Generator().manual_seed(3)
    video = torch.rand(2, 3, 4, 8, 8, generator=generator)
    video[0, :, :2] = 0.5  # constant patches: normalized to 0 by the 1e-6, not to infinity
    tokens = 256 // (patch_size[0] * patch_size[1] * patch_size[2])
    target = torch.rand(2, tokens, generator=generator).argsort(dim=1)[:, : tokens // 2]
    predicted = torch.randn(2, tokens // 2, 3 * 256 // tokens, generator=generator)
    loss = masked_pixel_loss(predicted, video, target, patch_size)
    assert loss.item() == pytest.approx(loss_in_loops(predicted, video, target, patch_size), abs=1e-5)


def test_positions_equal_transformers_table():
    config = hf_config("odd-sizes")
    reference = VideoMAEForPreTraining(config)
    encoder = vit.VisionTransformer(12, 3, 4, 1, embed_dim=47, depth=1, num_heads=1)
    model = MaskedAutoencoder(encoder, decoder_dim=24, decoder_depth=1, decoder_num_heads=3)
    torch.testing.assert_close(encoder.positions, reference.videomae.embeddings.position_embeddings[0])
    torch.testing.assert_close(model.decoder_positions, reference.position_embeddings[0])


def test_decoder_adds_positions_to_visible_tokens(tmp_path):
    """Reordering the visible tokens does not change the prediction; moving one to a different position does."""
    config = hf_config("final-norm")
    path = write(tmp_path, "huggingface.bin", randomized(VideoMAEForPreTraining(config)).state_dict())
    model = load_pretrained(path, config)
    _, inputs, keep, target = clips_and_masks(config)
    with torch.no_grad():
        expected = model(inputs, keep, target)
        torch.testing.assert_close(model(inputs, keep.flip(1), target), expected, **TOLERANCE)
        backwards = model(inputs, keep, target.flip(1))
        torch.testing.assert_close(
            gather_tokens(backwards, torch.arange(5, -1, -1).expand(2, 6)), expected, **TOLERANCE
        )
        moved = target[:, :1]
        assert (model(inputs, moved, target) - expected).abs().max() > 1e-3
