"""Spool: receptive field of frames, streaming, masked tokens, and use as the encoder of every task."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from blueberry_video.masking import RandomMasking, TubeMasking
from blueberry_video.models import dinov2
from blueberry_video.models.classifier import FrameHead, VideoClassifier
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.hydra_video.model import HydraVideo
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.spool.attention import Heads, frame_attention
from blueberry_video.models.spool.model import Spool
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.optim import constant, parameter_groups
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.masked_pixels import MaskedPixels

FRAME = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 1, "embed_dim": 16, "depth": 1}


def vit(**changes) -> Encoder:
    return VisionTransformer(**{**FRAME, "num_heads": 2, "images": True, "qkv_bias": "qkv", **changes})


def dino(**changes) -> Encoder:
    return DINOv2(
        image_size=16, num_frames=4, patch_size=8, embed_dim=16, depth=1, num_heads=2, table_size=3, **changes
    )


def hydra() -> Encoder:
    return HydraVideo(**FRAME, head_dim=8, state_dim=8, images=True)


def tiny(backbone: Encoder | None = None, lookback: int = 2, heads: int = 4, **changes) -> Spool:
    torch.manual_seed(0)
    options = {
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_lookback_heads": lookback,
        "num_lookahead_heads": heads - lookback,
        "image_size": 16,
        "num_frames": 4,
        "local_frame_range": 1,
        "freeze_backbone": False,
    }
    return Spool(backbone or vit(), **{**options, **changes}).eval()


def clips(frames: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, frames, 16, 16, dtype=dtype)


# ---- receptive field -------------------------------------------------------------------------------------------------


def reached_from(model: Spool, frame: int, frames: int) -> list[bool]:
    """Flag per frame of the video: whether the features of frame ``frame`` depend on it."""
    video = clips(frames, batch=1, dtype=torch.float64).requires_grad_()
    out = model.features(video).features[0, frame + 1]
    gradient = torch.autograd.grad((out * torch.randn_like(out)).sum(), video)[0]
    return (gradient[0].abs().amax(dim=(0, 2, 3)) > 0).tolist()


@pytest.mark.parametrize("lookback", [0, 1, 4])
@pytest.mark.parametrize("mode", ["both", "split"])
def test_one_block_reaches_the_neighbors_and_two_reach_the_whole_video(lookback, mode):
    for layers in (1, 2):
        model = tiny(lookback=lookback, context_mode=mode, num_hidden_layers=layers).double()
        for frame in (0, 3, 6):
            first, last = frame - (lookback > 0), frame + (lookback < 4)
            near = [first <= other <= last for other in range(7)]
            assert reached_from(model, frame, 7) == (near if layers == 1 else [True] * 7)


def test_causal_receptive_field_grows_with_depth():
    model = tiny(lookback=4, context_mode="causal").double()
    assert reached_from(model, 4, 7) == [False, False, True, True, True, False, False]


@torch.no_grad()
def test_backbone_encodes_frames_independently_and_only_blocks_depend_on_order():
    model, video = tiny(num_hidden_layers=0, temporal_sinusoid=False), clips(5)
    order = torch.randperm(5)
    tokens = model(video).unflatten(1, (5, 4))
    torch.testing.assert_close(model(video[:, :, order]).unflatten(1, (5, 4)), tokens[:, order], atol=1e-6, rtol=1e-6)
    blocks = tiny(temporal_sinusoid=False, lookback=3)
    contexts = blocks.context(video), blocks.context(video[:, :, order])
    assert (contexts[0] - contexts[1]).abs().max() > 1e-4


@torch.no_grad()
def test_features_equal_the_dense_reference(monkeypatch):
    model, video = tiny(lookback=3, temporal_sinusoid=True, context_mode="split"), clips(9)
    banded = model.features(video)

    def reference(q, k, v, layout, heads):
        return frame_attention(q, k, v, layout, heads, backend="reference")

    monkeypatch.setattr("blueberry_video.models.spool.attention.frame_attention", reference)
    for ours, dense in zip(banded, model.features(video), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4, 11])
def test_output_shapes_and_context(frames):
    model, video = tiny(), clips(frames)
    features, context = model.features(video)
    assert features.shape == (2, frames + 2, 4, 16)
    assert torch.equal(model(video), features[:, 1:-1].flatten(1, 2))
    assert torch.equal(context, torch.cat([features[:, 0].mean(1), features[:, -1].mean(1)], dim=1))
    assert torch.equal(model.context(video), context)
    assert (model.context_dim, model.patch_size, model.grid(video.shape)) == (32, (1, 8, 8), (frames, 2, 2))


@torch.no_grad()
def test_temporal_sinusoid_encodes_the_frame_index():
    still = clips(1).expand(-1, -1, 4, -1, -1)
    with_it, without = (tiny(num_hidden_layers=0, temporal_sinusoid=on, final_norm=False) for on in (True, False))
    added = (with_it(still) - without(still)).unflatten(1, (4, 4))
    expected = torch.stack(
        [f(torch.arange(1.0, 5)[:, None] / 10000 ** (torch.arange(8) / 8)) for f in (torch.sin, torch.cos)]
    )
    torch.testing.assert_close(added[0, :, 0], expected.permute(1, 2, 0).flatten(1), atol=1e-5, rtol=1e-5)


# ---- streaming -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("reach", [0, 1, 3, 100])
def test_streaming_equals_the_whole_video_and_its_context(reach):
    model = tiny(lookback=4, context_mode="causal", num_hidden_layers=3, local_frame_range=reach)
    video, state, parts = clips(12), None, []
    whole = model(video)
    for frame, part in enumerate(video.split(1, dim=2), start=1):
        features, state = model.stream(part, state)
        parts.append(features)
        so_far = model.context(video[:, :, :frame])
        torch.testing.assert_close(model.stream_context(state), so_far, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    uneven, state = model.stream(video[:, :, :5])
    rest, _ = model.stream(video[:, :, 5:], state)
    torch.testing.assert_close(torch.cat([uneven, rest], 1), whole, atol=1e-5, rtol=1e-5)


def test_streaming_state_has_constant_size():
    model, state, sizes = tiny(lookback=4, context_mode="causal", local_frame_range=3), None, []
    for _ in range(12):
        features, state = model.stream(clips(1), state)
        kept = [part for layer in state.past for pair in layer for part in pair]
        sizes.append(sum(part.untyped_storage().nbytes() for part in kept))
        assert not features.requires_grad
    assert sizes[2:] == sizes[2:3] * 10
    assert sizes[-1] == 2 * 2 * (1 + 3) * 2 * 4 * 16 * 4  # layers, keys and values, frames, batch, tokens, width, bytes


def test_invalid_streaming_raises():
    with pytest.raises(ValueError, match=r"context_mode=causal\b.*num_lookback_heads=4\b.*num_lookahead_heads=0\b"):
        tiny(lookback=4).stream(clips(1))
    with pytest.raises(ValueError, match=r"context_mode=causal\b.*num_lookback_heads=4\b.*num_lookahead_heads=0\b"):
        tiny(context_mode="causal")
    _, state = tiny(lookback=4, context_mode="causal").stream(clips(1))
    with pytest.raises(ValueError, match=r"\b2 layers.*\b2 videos.*\b3 layers"):
        tiny(lookback=4, context_mode="causal", num_hidden_layers=3).stream(clips(1), state)
    with pytest.raises(ValueError, match=r"\b2 videos.*\b1 videos"):
        tiny(lookback=4, context_mode="causal").stream(clips(1, batch=1), state)


# ---- masked tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone", [vit, dino, hydra])
def test_output_depends_on_visible_tokens_only(backbone):
    model, keep = (tiny(backbone()), torch.tensor([[15, 0, 3, 6], [1, 4, 8, 12]]))  # per frame: 2, 1, 0, 1 and 1 each
    video = clips()
    expected = model(video, keep)
    changed = video.clone()
    changed[:1, :, 0, :8, 8:] += 1.0  # token 1 of the first video: hidden
    changed[:, :, 2, 8:] += 1.0  # tokens 10 and 11: hidden
    assert torch.equal(model(changed, keep), expected)
    changed[:1, :, 0, 8:, 8:] += torch.randn(8, 8)  # token 3 of the first: visible
    moved = (model(changed, keep) - expected).abs().amax(dim=2)
    assert moved[0].min() > 0
    assert moved[1].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("backbone", [vit, dino, hydra])
def test_keeping_all_tokens_equals_no_mask_in_any_order(backbone):
    model, video, order = tiny(backbone()), clips(), torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(model(video, order), gather_tokens(model(video), order), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_ragged_frames_does_not_affect_the_output():
    """A video has the same output in a batch, which pads shorter frames, as alone."""
    model, video = tiny(), clips()
    keep = torch.tensor([[0, 1, 2, 3, 4, 15], [0, 5, 6, 8, 12, 13]])
    together = model(video, keep)
    for row in range(2):
        torch.testing.assert_close(model(video[row : row + 1], keep[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (torch.tensor([[1, 2]]), r"keep.*torch\.int64.*\(1, 2\)"),
        (torch.rand(2, 3), r"keep.*torch\.float32.*\(2, 3\)"),
        (torch.ones(2, 16, dtype=torch.bool), r"keep.*torch\.bool.*\(2, 16\)"),
        (torch.tensor([[2, 3], [1, 1]]), r"keep.*index 1 twice"),
        (torch.tensor([[1, 16], [2, 3]]), r"keep.*\b1\b.*\b16\b.*4 x 2 x 2\b.*\b15\b"),
        (torch.empty(2, 0, dtype=torch.long), r"keep.*\(2, 0\).*empty"),
    ],
)
def test_invalid_keep_raises(keep, expected):
    with pytest.raises(ValueError, match=expected):
        tiny()(clips(), keep)


# ---- the backbone ----------------------------------------------------------------------------------------------------


def test_frozen_backbone_stays_in_eval_mode_without_gradients():
    model = tiny(freeze_backbone=True).train()
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    model(clips()).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    learns = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    assert all(parameter.grad is not None for parameter in learns)
    assert tiny().train().backbone.training


@torch.no_grad()
def test_published_dinov2_works_as_backbone(tmp_path):
    published = dino(layer_scale_init=1.0)
    torch.save(dinov2.to_original(published.state_dict()), tmp_path / "dinov2.pth")
    model = tiny(dino(weights=str(tmp_path / "dinov2.pth")), freeze_backbone=True)
    bare = tiny(published.eval(), num_hidden_layers=0, temporal_sinusoid=False, final_norm=False)
    video = clips()
    assert torch.equal(bare(video), published(video))
    assert torch.equal(model.backbone(video), published(video))
    assert model.features(video).features.shape == (2, 6, 4, 16)


@pytest.mark.parametrize(
    ("backbone", "changes", "expected"),
    [
        ({"images": False}, {}, r"backbone\.images=false.*backbone\.images=true"),
        ({"image_size": 32}, {}, r"backbone.*\(3, 32, 32\).*\(3, 16, 16\).*image_size"),
        ({}, {"image_size": 20}, r"image_size=20\b.*patch_size=8\b.*\b16\b"),
        ({}, {"heads": 3}, r"num_attention_heads=3\b.*\b16\b"),
        ({}, {"num_lookahead_heads": 3}, r"num_lookahead_heads=3\b.*num_attention_heads=4\b"),
        ({}, {"local_frame_range": -1}, r"local_frame_range=-1\b"),
        ({}, {"context_mode": "none"}, "context_mode='none'.*'both'.*'split'.*'causal'"),
        ({}, {"context_mode": "none", "num_hidden_layers": 0}, "context_mode='none'.*'both'.*'split'.*'causal'"),
        ({}, {"num_lookahead_heads": 3, "num_hidden_layers": 0}, r"num_lookahead_heads=3\b.*num_attention_heads=4\b"),
        ({}, {"num_hidden_layers": -1}, r"num_hidden_layers=-1\b"),
    ],
)
def test_bad_arguments_raise(backbone, changes, expected):
    with pytest.raises(ValueError, match=expected):
        tiny(vit(**backbone), **changes)


@pytest.mark.parametrize(
    "shape", [(2, 3, 0, 16, 16), (2, 3, 4, 16, 24), (2, 1, 4, 16, 16), (2, 4, 16, 16, 3), (3, 4, 16, 16)]
)
def test_invalid_video_shapes_raise(shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*C ?= ?3\b.*\(16, 16\).*image_size"):
        tiny()(torch.zeros(shape))


# ---- the interface of the original -----------------------------------------------------------------------------------


def dinov2_folder(folder: Path) -> Dinov2Model:
    """Tiny random DINOv2 of transformers, saved as a folder; positions of 3 x 3 patches are interpolated to 2 x 2."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8, layerscale_value=1.0
    )
    theirs = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(folder)
    return theirs


def from_folder(folder: Path, **changes) -> Spool:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_lookahead_heads": 1, "num_lookback_heads": 3}
    return Spool.from_backbone(folder, **{**heads, "image_size": 16, "local_frame_range": 1, **changes}).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_frames_are_encoded_as_by_transformers(dtype, tmp_path):
    theirs = dinov2_folder(tmp_path)
    frames = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = ((frames / 255 - mean) / std).flatten(0, 1).movedim(3, 1)
    patches = theirs(normalized).last_hidden_state[:, 1:].unflatten(0, (2, 3))

    model = from_folder(tmp_path)
    given = frames if dtype == torch.uint8 else frames / 255
    video = normalized.unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(model.backbone(video).unflatten(1, (3, 4)), patches, atol=1e-4, rtol=1e-4)
    bare = from_folder(tmp_path, num_hidden_layers=0)
    bare.norm, bare.temporal_sinusoid = torch.nn.Identity(), False
    torch.testing.assert_close(bare.encode_frames(given).features[:, 1:-1], patches, atol=1e-4, rtol=1e-4)

    features, context = model(given)
    torch.testing.assert_close(context, model.encode_frames(given).context, rtol=0, atol=0)
    assert features.shape == (2, 5, 4, 16)
    assert context.shape == (2, 32)
    expected = model.features(video)
    torch.testing.assert_close(features, expected.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(context, expected.context, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 56), (16, 31), (9, 12)])
def test_frames_of_other_sizes_are_resized_with_antialiasing(size):
    model, seen = tiny(), []
    frames = torch.randint(256, (1, 2, *size, 3), dtype=torch.uint8)
    model.features = lambda video: seen.append(video)
    model.encode_frames(frames)
    pixels = seen[0][0].permute(1, 2, 3, 0) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    for frame, found in zip(frames[0], pixels * 255, strict=True):
        expected = Image.fromarray(frame.numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert (
            found - torch.from_numpy(np.array(expected)).float()
        ).abs().max() < 1.5  # Pillow rounds rows and columns


def test_arguments_of_the_original_and_their_defaults(tmp_path):
    dinov2_folder(tmp_path)
    names = ["num_hidden_layers", "num_attention_heads", "num_lookahead_heads", "num_lookback_heads"]
    published = {"backbone_name": "facebook/dinov2-base", **dict(zip(names, (12, 12, 6, 6), strict=True))}
    defaults = {key: value.default for key, value in inspect.signature(Spool.from_backbone).parameters.items()}
    assert defaults.items() >= (published | {"image_size": 224, "local_frame_range": 16}).items()
    model = from_folder(tmp_path, context_mode="original", local_frame_range=5)
    assert len(model.blocks) == 2
    assert model.blocks[0].attn.heads == Heads(3, 5, "original")
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with pytest.raises(ValueError, match=r"num_lookahead_heads=2\b.*num_attention_heads=4\b"):
        from_folder(tmp_path, num_lookahead_heads=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Spool.from_backbone(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 3, 16, 16),
        torch.zeros(2, 0, 16, 16, 3),
        torch.zeros(3, 16, 16, 3),
        torch.zeros(2, 3, 16, 16, 4),
        torch.zeros(2, 3, 16, 16, 3, dtype=torch.long),
    ],
)
def test_invalid_frames_raise(frames):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tuple(frames.shape)))}.*{frames.dtype}.*\(B, T, H, W, C\)"):
        tiny().encode_frames(frames)


@torch.no_grad()
def test_original_mode_runs_with_the_weights_of_every_mode():
    video = clips(5)
    outputs = {}
    for mode in ("both", "split", "original"):
        model = tiny(lookback=3, context_mode=mode)
        outputs[mode] = model.features(video).features
        keep = torch.arange(20)[None].expand(2, -1)
        torch.testing.assert_close(model(video, keep), model(video), atol=1e-5, rtol=1e-5)
    assert (outputs["original"] - outputs["both"]).abs().max() > 1e-3
    assert (outputs["original"] - outputs["split"]).abs().max() > 1e-3


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["context", "mean"])
@pytest.mark.parametrize("backbone", [vit, dino])
def test_trains_as_a_classifier(pooling, backbone, check_training, options):
    model = VideoClassifier(tiny(backbone()), {"motion": 8}, pooling=pooling, head_init_scale=1.0)
    check_training(Classification(model, **options), frozen_parameters=True)


@torch.no_grad()
def test_classifier_pools_the_context():
    model, video = VideoClassifier(tiny(), {"motion": 8}, pooling="context", head_init_scale=1.0).eval(), clips()
    normed = F.layer_norm(model.encoder.context(video), (32,), eps=1e-6)
    torch.testing.assert_close(model(video)["motion"], model.head.linear["motion"](normed))
    with pytest.raises(ValueError, match=r"model\.pooling=context.*VisionTransformer.*conf/model/spool/"):
        VideoClassifier(vit(), {"motion": 8}, pooling="context")
    with pytest.raises(ValueError, match=r"model\.pooling=context.*Spool.*num_hidden_layers"):
        VideoClassifier(tiny(num_hidden_layers=0), {"motion": 8}, pooling="context")


@pytest.mark.parametrize("masking", [TubeMasking(0.5), RandomMasking(0.6)])
def test_trains_as_a_masked_autoencoder(masking, check_training, options):
    model = MaskedAutoencoder(tiny(), decoder_dim=12, decoder_depth=1, decoder_num_heads=2)
    check_training(MaskedPixels(model, masking=masking, **options), frozen_parameters=True)


@pytest.mark.parametrize("encoder", [tiny, dino])
def test_trains_as_a_jepa_encoder(encoder, check_training, options):
    model = JEPA(encoder(), predictor_dim=12, predictor_depth=1, predictor_num_heads=2, num_mask_tokens=1)
    check_training(
        LatentPrediction(model, maskings=[RandomMasking(0.5)], momentum=constant, **options), frozen_parameters=True
    )


@pytest.mark.parametrize("teacher", [tiny, dino])
def test_trains_a_jepa_as_teacher(teacher, tmp_path, check_training, options):
    torch.save(teacher().state_dict(), tmp_path / "teacher.pt")
    model = JEPA(vit(), 12, 1, 2, num_mask_tokens=1, ema=False, teacher=teacher())
    module = LatentPrediction(model, maskings=[RandomMasking(0.5)], teacher_from=tmp_path / "teacher.pt", **options)
    check_training(module, frozen_parameters=True)


def test_frame_head_scores_single_frames():
    model, head, video = tiny(), FrameHead(16, {"phase": 5, "hit": 2}), clips(3)
    features = model.features(video).features[:, 1:-1]
    scores = head(features)
    assert {name: tuple(value.shape) for name, value in scores.items()} == {"phase": (2, 3, 5), "hit": (2, 3, 2)}
    frame = F.layer_norm(features[1, 2].mean(0), (16,), eps=1e-6)
    torch.testing.assert_close(scores["phase"][1, 2], head.linear["phase"](frame))
    with pytest.raises(ValueError, match=r"\(2, 12, 16\).*\(B, T, S, D\)"):
        head(model(video))
    with pytest.raises(ValueError, match="num_classes"):
        FrameHead(16, {})


def test_num_lookahead_heads_defaults_to_the_remaining_heads():
    model = tiny(lookback=1, num_lookahead_heads=None)
    assert model.blocks[0].attn.heads.lookback == 1
    with pytest.raises(ValueError, match=r"num_lookback_heads=5\b.*num_lookahead_heads=-1\b.*num_attention_heads=4\b"):
        tiny(lookback=5, num_lookahead_heads=None)


def test_layer_decay_gives_separate_learning_rates_and_context_frames_have_no_decay():
    groups = parameter_groups(VideoClassifier(tiny(), {"motion": 8}), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]
    model = tiny()
    _, rest = parameter_groups(torch.nn.ModuleDict({"encoder": model}))
    assert any(parameter is model.context_frames for parameter in rest["params"])


@torch.no_grad()
def test_own_checkpoint_loads(tmp_path):
    trained, other = tiny(), tiny(final_norm=False)
    for parameter in trained.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    state = {f"model.encoder.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "run.pt")
    other.load_published(tmp_path / "run.pt")
    trained.norm = torch.nn.Identity()
    video = clips()
    torch.testing.assert_close(other(video), trained(video))
