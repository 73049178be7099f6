"""VisionTransformer: properties that follow from its definition, weights and errors."""

import math
import re

import pytest
import torch
from torch.nn.functional import linear

from blueberry_video.models import vit
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.optim import decayed_names


def tiny(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 2, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(**{**sizes, "depth": 2, **changes}).eval()


def test_without_blocks_a_token_is_its_projected_patch_plus_a_sinusoid():
    encoder = tiny(depth=0, final_norm=False)
    video = torch.randn(2, 3, 4, 16, 16)
    tokens = encoder(video)
    assert tokens.shape == (2, 8, 16)
    weight, bias = encoder.patch_embed.proj.weight.flatten(1), encoder.patch_embed.proj.bias
    for n, (t, i, j) in enumerate((t, i, j) for t in range(2) for i in range(2) for j in range(2)):
        patch = video[:, :, 2 * t : 2 * t + 2, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten(1)
        angles = [n / 10000 ** (2 * (k // 2) / 16) for k in range(16)]
        position = torch.tensor([math.cos(a) if k % 2 else math.sin(a) for k, a in enumerate(angles)])
        torch.testing.assert_close(tokens[:, n], linear(patch, weight, bias) + position, atol=1e-5, rtol=1e-5)


def test_kept_tokens_keep_their_positions():
    encoder = tiny(depth=0, final_norm=False)
    video, keep = torch.randn(2, 3, 4, 16, 16), torch.tensor([[0, 3, 7], [1, 2, 6]])
    torch.testing.assert_close(encoder(video, keep), gather_tokens(encoder(video), keep))


def test_output_depends_on_visible_tokens_only():
    encoder, keep = tiny(), torch.tensor([[0, 3, 6]])
    video = torch.randn(1, 3, 4, 16, 16)
    expected = encoder(video, keep)
    changed = video.clone()
    changed[:, :, :2, :8, 8:] += 1.0  # token 1: hidden
    assert torch.equal(encoder(changed, keep), expected)
    changed[:, :, :2, :8, :8] += torch.randn(8, 8)  # token 0: visible
    assert (encoder(changed, keep) - expected).abs().amin(dim=2).min() > 1e-6  # every token attends to it


def test_output_has_the_order_of_keep():
    encoder, keep = tiny(), torch.tensor([[0, 3, 6, 7]])
    video, order = torch.randn(1, 3, 4, 16, 16), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(encoder(video, keep[:, order]), encoder(video, keep)[:, order])


def test_keeping_all_tokens_in_order_equals_no_mask():
    encoder, video = tiny(), torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(encoder(video, torch.arange(8).expand(2, 8)), encoder(video))


@pytest.mark.parametrize("shape", [(3, 4, 16, 24), (3, 6, 16, 16), (1, 4, 16, 16), (4, 3, 16, 16)])
def test_invalid_video_shape_raises_with_both_shapes(shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\(3, 4, 16, 16\).*num_frames.*image_size"):
        tiny()(torch.zeros(2, *shape))


def test_single_frame_equals_the_first_tubelet_of_a_static_clip():
    encoder, frame = tiny(images=True), torch.randn(2, 3, 1, 16, 16)
    assert encoder.grid(frame.shape) == (1, 2, 2)
    tokens = encoder(frame)
    assert tokens.shape == (2, 4, 16)
    still = frame.repeat(1, 1, 4, 1, 1)  # a static clip, of which only the first tokens are visible
    torch.testing.assert_close(tokens, encoder(still, torch.arange(4).expand(2, 4)))
    keep = torch.tensor([[0, 3], [1, 2]])
    torch.testing.assert_close(encoder(frame, keep), encoder(still, keep))
    assert encoder(still).shape == (2, 8, 16)


def test_as_clip_repeats_a_single_frame_and_returns_clips_unchanged():
    encoder, frame, clip = tiny(images=True), torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(encoder.as_clip(frame), torch.cat([frame, frame], dim=2))
    assert encoder.as_clip(clip) is clip
    assert encoder.grid(clip.shape) == (2, 2, 2)


def test_single_frame_without_images_raises():
    with pytest.raises(ValueError, match=r"\(3, 1, 16, 16\).*model\.encoder\.images=true"):
        tiny()(torch.zeros(2, 3, 1, 16, 16))


@pytest.mark.parametrize("shape", [(3, 2, 16, 16), (3, 1, 16, 8), (1, 1, 16, 16)])
def test_invalid_shape_with_images_raises_with_both_accepted_shapes(shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\(3, 4, 16, 16\).*\(3, 1, 16, 16\)"):
        tiny(images=True)(torch.zeros(2, *shape))


@pytest.mark.parametrize(
    ("sizes", "key", "nearest"),
    [
        ({"image_size": 30}, "image_size=30", "32"),
        ({"image_size": 18}, "image_size=18", "16"),
        ({"image_size": 4}, "image_size=4", "8"),
        ({"num_frames": 1}, "num_frames=1", "2"),
        ({"num_frames": 7, "tubelet_size": 4}, "num_frames=7", "8"),
    ],
)
def test_indivisible_sizes_raise_with_the_nearest_legal_size(sizes, key, nearest):
    with pytest.raises(ValueError, match=rf"{key}\b.*(patch_size|tubelet_size)=\d\b.*\b{nearest}\b"):
        tiny(**sizes)


@pytest.mark.parametrize("num_heads", [3, 0])
def test_indivisible_num_heads_raises(num_heads):
    with pytest.raises(ValueError, match=rf"num_heads={num_heads}\b.*\b16\b"):
        tiny(num_heads=num_heads)


def test_grid_counts_tokens_along_time_height_and_width():
    encoder = VisionTransformer(image_size=224, num_frames=16, depth=0)
    assert encoder.grid((2, 3, 16, 224, 224)) == (8, 14, 14)
    assert encoder.num_tokens == 1568
    assert encoder.embed_dim == 768
    assert encoder.patch_size == (2, 16, 16)


@pytest.mark.parametrize("qkv_bias", ["qv", "qkv", "none"])
def test_every_parameter_receives_a_gradient(qkv_bias):
    encoder = tiny(qkv_bias=qkv_bias, drop_path=0.1)
    encoder(torch.randn(2, 3, 4, 16, 16), torch.tensor([[0, 3, 6], [1, 4, 5]])).square().mul(
        torch.rand(16)
    ).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_drop_path_grows_linearly_to_the_last_block():
    assert [block.drop_path.rate for block in tiny(depth=5, drop_path=0.2).blocks] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )


def test_drop_path_acts_only_in_training():
    encoder, video = tiny(depth=4, drop_path=0.9), torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(encoder(video), encoder(video))
    encoder.train()
    assert not torch.equal(encoder(video), encoder(video))


def test_initial_weights_are_those_of_the_original():
    encoder = tiny(embed_dim=64, num_heads=4)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            assert torch.equal(parameter, torch.ones(64)), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        elif parameter.ndim == 2:  # Xavier uniform: U(-a, a) with a = sqrt(6 / (fan in + fan out))
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < parameter.abs().max() <= bound, name
    bound = 1 / math.sqrt(3 * 2 * 8 * 8)  # torch's initialization of a convolution
    assert 0.98 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound


def test_positions_are_not_in_the_state_dict():
    assert not any("position" in name for name in tiny().state_dict())


def test_build_from_weights_infers_the_size():
    source = tiny(embed_dim=47, num_heads=1, mlp_ratio=61 / 47, depth=3, image_size=24, in_channels=2, final_norm=False)
    copy = vit.VisionTransformer.from_weights(
        source.state_dict(), "source", num_frames=4, image_size=24, num_heads=1
    ).eval()
    video = torch.randn(1, 2, 4, 24, 24)
    assert torch.equal(copy(video), source(video))


def test_load_encoder_raises_with_the_first_mismatched_weight(tmp_path):
    state = tiny().state_dict()
    wrong = {
        "blocks.1.mlp.fc2.bias": {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"},
        "pos_embed": {**state, "pos_embed": torch.zeros(1, 8, 16)},
        "patch_embed.proj.bias": {**state, "patch_embed.proj.bias": torch.zeros(8)},
    }
    for name, weights in wrong.items():
        torch.save(weights, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=rf"(?s)wrong\.pth.*\b1\b.*{re.escape(name)}"):
            tiny().load_published(tmp_path / "wrong.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*patch_embed\.proj\.weight.*fc\.weight"):
        tiny().load_published(tmp_path / "other.pth")


def test_final_norm_without_a_counterpart_is_ignored_and_reported(tmp_path):
    source, target = tiny(), tiny(final_norm=False)
    torch.save(source.state_dict(), tmp_path / "normed.pth")
    assert "norm.bias, norm.weight" in target.load_published(tmp_path / "normed.pth")
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert "norm.bias" not in tiny().load_published(tmp_path / "normed.pth")


def test_final_norm_missing_from_the_file_keeps_its_values(tmp_path):
    source, target = tiny(final_norm=False), tiny()
    torch.nn.init.constant_(source.blocks[1].mlp.fc1.weight, 0.25)
    torch.nn.init.constant_(target.norm.weight, 3.0)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    assert "norm.bias, norm.weight" in target.load_published(tmp_path / "plain.pth")
    assert torch.equal(target.norm.weight, torch.full((16,), 3.0))
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_layer_scale_and_learned_positions_are_those_of_videomae():
    """x + gamma_1 * attention, x + gamma_2 * MLP; a table (1, N, D) under ``pos_embed``, without weight decay."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(16, 4, 8, 2, **sizes, positions="learned", layer_scale=0.1).eval()
    assert {"pos_embed", "blocks.0.gamma_1", "blocks.1.gamma_2"} <= model.state_dict().keys()
    assert (model.blocks[0].gamma_1 == 0.1).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert not {"pos_embed", "blocks.0.gamma_1"} & decayed_names(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    video = torch.randn(2, 3, 4, 16, 16)
    x = model.patch_embed(video, None) + model.pos_embed
    for block in model.blocks:
        x = x + block.gamma_1 * block.attn(block.norm1(x))
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    torch.testing.assert_close(model(video), model.norm(x))
    keep = torch.tensor([[0, 3, 5], [1, 2, 7]])
    first = model.patch_embed(video, keep) + model.pos_embed[0][keep]
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(video, keep)
    torch.testing.assert_close(seen[0], first)
    loaded = VisionTransformer.from_weights(model.state_dict(), "file", 2, 4, 16).eval()
    torch.testing.assert_close(loaded(video), model(video))
