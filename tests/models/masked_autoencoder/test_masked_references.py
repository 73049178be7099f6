"""Parity of VideoMAE V2 and OmniMAE, in loss and all gradients, with float64 references written from their formulas.

The references process one sample at a time, with boolean masks over the tokens in raster order and the parameter names
of the original files. They use no code of this package.
"""

import math

import pytest
import torch
from torch import Tensor

from blueberry_video.masking import ByModality, DualMasking, Masks, RandomMasking, TubeMasking
from blueberry_video.models.masked_autoencoder import convert
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import Optimization

TUBELET, PATCH, CHANNELS = 2, 4, 3
WIDTH, HEADS, DECODER_WIDTH, DEPTH = 16, 2, 32, 2
PATCH_DIM = CHANNELS * TUBELET * PATCH * PATCH
Weights = dict[str, Tensor]


# ---- the references --------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """Transformer block, (N, D) -> (N, D), with any of the three variants of the QKV bias."""
    width = x.shape[1]
    qkv = layer_norm(x, weights, f"{name}.norm1") @ weights[f"{name}.attn.qkv.weight"].T
    if f"{name}.attn.qkv.bias" in weights:
        qkv = qkv + weights[f"{name}.attn.qkv.bias"]
    elif f"{name}.attn.q_bias" in weights:
        no_key_bias = torch.zeros(width, dtype=x.dtype)
        qkv = qkv + torch.cat([weights[f"{name}.attn.q_bias"], no_key_bias, weights[f"{name}.attn.v_bias"]])
    size, heads_out = width // heads, []
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        scores = q @ k.T / math.sqrt(size)
        weight = (scores - scores.max(dim=1, keepdim=True).values).exp()
        heads_out.append(weight / weight.sum(dim=1, keepdim=True) @ v)
    x = x + linear(torch.cat(heads_out, dim=1), weights, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def positions(count: int, width: int) -> Tensor:
    rows = [[n / 10000 ** (2 * (c // 2) / width) for c in range(width)] for n in range(count)]
    table = [[math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(row)] for row in rows]
    return torch.tensor(table).double()  # a float32 table, as files hold it


def cut(clip: Tensor) -> list[Tensor]:
    """Patches (C, t, h, w) of a clip (C, T, H, W), in raster order."""
    _, frames, height, width = clip.shape
    return [
        clip[:, t : t + TUBELET, i : i + PATCH, j : j + PATCH]
        for t in range(0, frames, TUBELET)
        for i in range(0, height, PATCH)
        for j in range(0, width, PATCH)
    ]


def embed(clip: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Patch embedding of a clip that is normalized with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(x).double().view(3, 1, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return torch.stack([kernel.flatten(1) @ patch.flatten() + bias for patch in cut((clip - mean) / std)])


def targets(clip: Tensor, under_root: bool) -> Tensor:
    """Prediction targets (N, pixels * C), with the channel as the fastest index."""
    rows = []
    for patch in cut(clip):
        normalized = []
        for channel in patch.flatten(1):
            variance = (channel - channel.mean()).square().sum() / (len(channel) - 1)
            divisor = (variance + 1e-6) ** 0.5 if under_root else variance.sqrt() + 1e-6
            normalized.append((channel - channel.mean()) / divisor)
        rows.append(torch.stack(normalized, dim=1).flatten())
    return torch.stack(rows)


def videomae_v2(weights: Weights, video: Tensor, visible: Tensor, decoded: Tensor) -> Tensor:
    """Loss of video (B, C, T, H, W) in [0, 1], with ``visible`` and ``decoded`` (B, N) bool."""
    errors = []
    for clip, seen, predicted_at in zip(video, visible, decoded, strict=True):
        x = embed(clip, weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"])
        x = (x + positions(len(x), WIDTH))[seen]
        for index in range(DEPTH):
            x = block(x, weights, f"encoder.blocks.{index}", HEADS)
        x = layer_norm(x, weights, "encoder.norm") @ weights["encoder_to_decoder.weight"].T
        table = positions(len(seen), DECODER_WIDTH)
        x = torch.cat([x + table[seen], weights["mask_token"][0] + table[predicted_at]])
        for index in range(DEPTH):
            x = block(x, weights, f"decoder.blocks.{index}", HEADS)
        predicted = linear(layer_norm(x[seen.sum() :], weights, "decoder.norm"), weights, "decoder.head")
        scored = ~seen[predicted_at]  # decoded tokens that are hidden from the encoder
        errors.append((predicted - targets(clip, under_root=False)[predicted_at])[scored].square().flatten())
    return torch.cat(errors).mean()


def omnimae(weights: Weights, video: Tensor, visible: Tensor) -> Tensor:
    """Loss of video (B, C, T, H, W) in [0, 1], an image if T = 1, with ``visible`` (B, N) bool."""
    errors = []
    for clip, seen in zip(video, visible, strict=True):
        clip = torch.cat([clip, clip], dim=1) if clip.shape[1] == 1 else clip
        x = embed(clip, weights["trunk.patch_embed.proj.1.weight"], weights["trunk.patch_embed.proj.1.bias"])
        table = positions(len(x), WIDTH)
        x = (x + table)[seen]
        for index in range(DEPTH):
            x = block(x, weights, f"trunk.blocks.{index}", HEADS)
        x = layer_norm(x, weights, "trunk.norm")
        whole = weights["trunk.mask_token"].expand(len(seen), -1).clone()
        whole[seen] = x
        x = linear(whole + table, weights, "trunk.decoder.decoder_embed")
        for index in range(DEPTH):
            x = block(x, weights, f"trunk.decoder.decoder_blocks.{index}", heads=16)
        predicted = linear(layer_norm(x, weights, "trunk.decoder.norm"), weights, "head")
        errors.append((predicted - targets(clip, under_root=True))[~seen].square().flatten())
    return torch.cat(errors).mean()


# ---- files of random weights -----------------------------------------------------------------------------------------


def noise(shape: dict[str, tuple[int, ...]]) -> Weights:
    """Random float64 weights; scales of norms are around 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, size in shape.items():
        is_scale = "norm" in name and name.endswith("weight")
        weights[name] = 0.2 * torch.randn(size, generator=generator, dtype=torch.float64) + is_scale
    return weights


def block_shapes(prefix: str, width: int, bias: str) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}.attn.qkv.weight": (3 * width, width)}
    if bias == "qkv":
        shapes[f"{prefix}.attn.qkv.bias"] = (3 * width,)
    elif bias == "qv":
        shapes |= {f"{prefix}.attn.{part}_bias": (width,) for part in "qv"}
    for name, size in (("attn.proj", (width, width)), ("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width))):
        shapes |= {f"{prefix}.{name}.weight": size, f"{prefix}.{name}.bias": size[:1]}
    for name in ("norm1", "norm2"):
        shapes |= {f"{prefix}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    return shapes


def pair(name: str, *size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": size, f"{name}.bias": size[:1]}


def videomae_v2_file() -> Weights:
    shapes = pair("encoder.patch_embed.proj", WIDTH, CHANNELS, TUBELET, PATCH, PATCH) | pair("encoder.norm", WIDTH)
    for index in range(DEPTH):
        shapes |= block_shapes(f"encoder.blocks.{index}", WIDTH, "qv")
        shapes |= block_shapes(f"decoder.blocks.{index}", DECODER_WIDTH, "qv")
    shapes |= {"encoder_to_decoder.weight": (DECODER_WIDTH, WIDTH), "mask_token": (1, 1, DECODER_WIDTH)}
    shapes |= pair("decoder.norm", DECODER_WIDTH) | pair("decoder.head", PATCH_DIM, DECODER_WIDTH)
    return noise(shapes)


def omnimae_file(tokens: int = 32) -> Weights:
    shapes = pair("trunk.patch_embed.proj.1", WIDTH, CHANNELS, TUBELET, PATCH, PATCH) | pair("trunk.norm", WIDTH)
    for index in range(DEPTH):
        shapes |= block_shapes(f"trunk.blocks.{index}", WIDTH, "qkv")
        shapes |= block_shapes(f"trunk.decoder.decoder_blocks.{index}", DECODER_WIDTH, "none")
    shapes |= pair("trunk.decoder.decoder_embed", DECODER_WIDTH, WIDTH) | pair("trunk.decoder.norm", DECODER_WIDTH)
    shapes |= {"trunk.mask_token": (1, WIDTH)} | pair("head", PATCH_DIM, DECODER_WIDTH)
    tables = {f"trunk.{part}pos_embed": positions(tokens, WIDTH)[None] for part in ("", "decoder.")}
    return noise(shapes) | tables


def load(path, file: Weights, **wrapping) -> MaskedAutoencoder:
    torch.save(wrapping or file, path)
    decoder_heads = None if "head.weight" in file else HEADS  # OmniMAE has 16 at every size
    return MaskedAutoencoder.from_published(path, 4, 16, HEADS, decoder_heads).double()


# ---- comparisons -----------------------------------------------------------------------------------------------------


def own_loss(model: MaskedAutoencoder, video: Tensor, masking, **options) -> Tensor:
    """Returns the training loss with masks of seed 0."""

    def seeded(batch_size: int, grid: tuple[int, int, int]) -> Masks:
        return masking(batch_size, grid, torch.Generator().manual_seed(0))

    module = MaskedPixels(model, Optimization(torch.optim.SGD, constant), seeded, **options).double()
    return module.shared_step({"video": video}, "train")["loss"]


def as_booleans(index: Tensor, tokens: int) -> Tensor:
    return torch.tensor([[token in row for token in range(tokens)] for row in index.tolist()])


def assert_same(ours: Tensor, theirs: Tensor, model: MaskedAutoencoder, gradients: Weights) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        largest = gradients[name].abs().max()
        assert largest > 1e-9, f"{name} has no gradient to compare"
        assert (gradient - gradients[name]).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("wrapping", ["bare", "model", "module"])
@pytest.mark.parametrize("masking", [DualMasking(TubeMasking(0.75)), DualMasking(RandomMasking(0.6), 0.25)])
def test_videomae_v2_equals_the_reference_in_loss_and_all_gradients(masking, wrapping, tmp_path):
    file = videomae_v2_file()
    model = load(tmp_path / "v2.pt", file, **({} if wrapping == "bare" else {wrapping: file, "epoch": 1}))
    video = torch.rand(3, CHANNELS, 4, 16, 16, dtype=torch.float64)
    masks = masking(3, (2, 4, 4), torch.Generator().manual_seed(0))
    assert not masks.scored.all()
    weights = {name: value.clone().requires_grad_() for name, value in file.items()}
    theirs = videomae_v2(weights, video, as_booleans(masks.keep, 32), as_booleans(masks.target, 32))
    ours = own_loss(model, video, masking=masking)
    theirs.backward()
    ours.backward()
    assert_same(ours, theirs, model, {name: value.grad for name, value in weights.items()})


@pytest.mark.parametrize("frames", [1, 4])
def test_omnimae_equals_the_reference_in_loss_and_all_gradients(frames, tmp_path):
    """The same weights are compared on a clip and on an image."""
    file = omnimae_file()
    model = load(tmp_path / "omnimae.torch", file)
    video = torch.rand(2, CHANNELS, frames, 16, 16, dtype=torch.float64)
    masking = ByModality(image=RandomMasking(0.75), clip=RandomMasking(0.9))
    masks = masking(2, ((frames + 1) // 2, 4, 4), torch.Generator().manual_seed(0))
    names = [name for name in file if not name.endswith("pos_embed")]
    weights = {name: file[name].clone().requires_grad_() for name in names}
    theirs = omnimae(weights, video, as_booleans(masks.keep, 16 * ((frames + 1) // 2)))
    ours = own_loss(model, video, masking=masking, eps_under_root=True)
    theirs.backward()
    ours.backward()
    gradients = convert.convert_omnimae({name: value.grad for name, value in weights.items()})
    assert_same(ours, theirs, model, gradients)


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_before_projection", [False, True])
def test_predictions_ignore_hidden_content_and_mask_tokens_ignore_visible_content(mask_before_projection):
    """The decoder input is a mask token plus a position embedding, also where the encoder saw the token."""
    encoder = VisionTransformer(16, 4, 4, 2, embed_dim=WIDTH, depth=1, num_heads=HEADS)
    model = MaskedAutoencoder(encoder, DECODER_WIDTH, 1, 2, mask_before_projection=mask_before_projection).eval()
    keep, target, scored = DualMasking(RandomMasking(0.5))(2, (2, 4, 4))
    assert not scored.all()
    inputs: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    video = torch.rand(2, CHANNELS, 4, 16, 16)
    predicted = model(video, keep, target)
    hidden_changed, visible_changed = torch.rand_like(video), torch.rand_like(video)
    for b in range(2):
        for token in range(32):
            t, rest = divmod(token, 16)
            i, j = divmod(rest, 4)
            patch = (b, slice(None), slice(2 * t, 2 * t + 2), slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
            source = hidden_changed if token in keep[b].tolist() else visible_changed
            source[patch] = video[patch]
    assert torch.equal(model(hidden_changed, keep, target), predicted)
    assert not torch.allclose(model(visible_changed, keep, target), predicted)
    masked = [x[:, keep.shape[1] :] for x in inputs]
    torch.testing.assert_close(masked[2], masked[0])
    assert not torch.allclose(inputs[2][:, : keep.shape[1]], inputs[0][:, : keep.shape[1]])
    assert masked[0].shape[1] == target.shape[1] == 16


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("mask_before_projection", [False, True])
def test_every_parameter_receives_a_gradient(mask_before_projection, frames):
    encoder = VisionTransformer(16, 4, 4, 2, embed_dim=WIDTH, depth=2, num_heads=HEADS, qkv_bias="qkv", images=True)
    model = MaskedAutoencoder(
        encoder, DECODER_WIDTH, 2, 16, qkv_bias="none", mask_before_projection=mask_before_projection
    )
    own_loss(
        model, torch.rand(2, CHANNELS, frames, 16, 16).double(), masking=DualMasking(RandomMasking(0.5))
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        is_key_bias = name.endswith("qkv.bias")  # the bias of keys cancels in the softmax: two thirds remain
        assert (parameter.grad != 0).float().mean() > (0.6 if is_key_bias else 0.9), name
