"""The plain video transformer, without a reference implementation: what must hold by its definition."""

import math

import pytest
import torch
from torch.nn.functional import linear

from blueberry_video.models import vit
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens


def tiny(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 2, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(**{**sizes, "depth": 2, **changes}).eval()


def test_a_token_without_blocks_is_its_projected_patch_plus_a_sinusoid():
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


def test_keep_takes_tokens_with_the_positions_of_their_places():
    encoder = tiny(depth=0, final_norm=False)
    video, keep = torch.randn(2, 3, 4, 16, 16), torch.tensor([[0, 3, 7], [1, 2, 6]])
    torch.testing.assert_close(encoder(video, keep), gather_tokens(encoder(video), keep))


def test_hidden_tokens_have_no_influence_and_visible_ones_have():
    encoder, keep = tiny(), torch.tensor([[0, 3, 6]])
    video = torch.randn(1, 3, 4, 16, 16)
    expected = encoder(video, keep)
    changed = video.clone()
    changed[:, :, :2, :8, 8:] += 1.0  # token 1: hidden
    assert torch.equal(encoder(changed, keep), expected)
    changed[:, :, :2, :8, :8] += torch.randn(8, 8)  # token 0: visible
    assert (encoder(changed, keep) - expected).abs().amin(dim=2).min() > 1e-6  # and every token attends to it


def test_order_of_keep_is_the_order_of_the_output():
    encoder, keep = tiny(), torch.tensor([[0, 3, 6, 7]])
    video, order = torch.randn(1, 3, 4, 16, 16), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(encoder(video, keep[:, order]), encoder(video, keep)[:, order])


def test_all_tokens_kept_in_order_is_no_mask():
    encoder, video = tiny(), torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(encoder(video, torch.arange(8).expand(2, 8)), encoder(video))


@pytest.mark.parametrize("shape", [(3, 4, 16, 24), (3, 6, 16, 16), (1, 4, 16, 16), (4, 3, 16, 16)])
def test_a_video_of_another_shape_is_refused_and_both_shapes_are_named(shape):
    with pytest.raises(ValueError, match="num_frames and image_size") as error:
        tiny()(torch.zeros(2, *shape))
    assert str(shape) in str(error.value)
    assert "(3, 4, 16, 16)" in str(error.value)


def test_a_single_frame_is_a_still_of_one_tubelet_at_the_first_places():
    encoder, frame = tiny(images=True), torch.randn(2, 3, 1, 16, 16)
    assert encoder.grid(frame.shape) == (1, 2, 2)
    tokens = encoder(frame)
    assert tokens.shape == (2, 4, 16)
    still = frame.repeat(1, 1, 4, 1, 1)  # a clip in which nothing moves: its first tokens, and no others seen
    torch.testing.assert_close(tokens, encoder(still, torch.arange(4).expand(2, 4)))
    keep = torch.tensor([[0, 3], [1, 2]])
    torch.testing.assert_close(encoder(frame, keep), encoder(still, keep))
    assert encoder(still).shape == (2, 8, 16)


def test_a_single_frame_is_repeated_over_its_tubelet_and_a_clip_is_left_alone():
    encoder, frame, clip = tiny(images=True), torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(encoder.as_clip(frame), torch.cat([frame, frame], dim=2))
    assert encoder.as_clip(clip) is clip
    assert encoder.grid(clip.shape) == (2, 2, 2)


def test_single_frames_are_refused_by_an_encoder_of_clips_alone():
    with pytest.raises(ValueError, match=r"\(3, 1, 16, 16\) .* single frames need model\.encoder\.images=true"):
        tiny()(torch.zeros(2, 3, 1, 16, 16))


@pytest.mark.parametrize("shape", [(3, 2, 16, 16), (3, 1, 16, 8), (1, 1, 16, 16)])
def test_an_encoder_of_images_names_both_shapes_it_takes(shape):
    with pytest.raises(ValueError, match=r"\(3, 4, 16, 16\) or, for images, \(C, 1, H, W\) = \(3, 1, 16, 16\)"):
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
def test_sizes_that_patches_do_not_divide_are_refused_with_the_nearest(sizes, key, nearest):
    with pytest.raises(ValueError, match=f"{key} .*is, is {nearest}\\."):
        tiny(**sizes)


@pytest.mark.parametrize("num_heads", [3, 0])
def test_heads_that_do_not_divide_the_width_are_refused(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads} does not divide the width 16"):
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


def test_drop_path_acts_in_training_alone():
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
    bound = 1 / math.sqrt(3 * 2 * 8 * 8)  # a convolution as torch makes it
    assert 0.98 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound


def test_positions_are_no_weights():
    assert not any("position" in name for name in tiny().state_dict())


def test_the_published_number_of_heads_is_read_off_the_width():
    heads = {384: 6, 768: 12, 1024: 16, 1280: 16, 192: 3, 512: 8, 640: 8}
    assert {width: width // vit.head_width(width) for width in heads} == heads


def test_weights_make_an_encoder_of_their_own_size():
    source = tiny(embed_dim=47, num_heads=1, mlp_ratio=61 / 47, depth=3, image_size=24, in_channels=2, final_norm=False)
    copy = vit.build_from_weights(source.state_dict(), num_frames=4, image_size=24, num_heads=1).eval()
    video = torch.randn(1, 2, 4, 24, 24)
    assert torch.equal(copy(video), source(video))


def test_load_encoder_says_what_does_not_fit(tmp_path):
    state = tiny().state_dict()
    wrong = {
        "1 missing, such as blocks.1.mlp.fc2.bias": {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"},
        "1 left over, such as pos_embed": {**state, "pos_embed": torch.zeros(1, 8, 16)},
        "1 of another shape, such as patch_embed.proj.bias": {**state, "patch_embed.proj.bias": torch.zeros(8)},
    }
    for text, weights in wrong.items():
        torch.save(weights, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=f"do not fit model.encoder: {text}"):
            vit.load_encoder(tiny(), tmp_path / "wrong.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no VideoMAE encoder among these weights \(fc\.weight"):
        vit.load_encoder(tiny(), tmp_path / "other.pth")


def test_a_final_norm_on_one_side_alone_is_left_out_and_said(tmp_path):
    source, target = tiny(), tiny(final_norm=False)
    torch.save(source.state_dict(), tmp_path / "normed.pth")
    assert "final norm was left out: norm.bias, norm.weight" in vit.load_encoder(target, tmp_path / "normed.pth")
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert "left out" not in vit.load_encoder(tiny(), tmp_path / "normed.pth")
