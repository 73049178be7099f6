"""CausalVideoVAE: sizes, causality, gradients, latent scale, checkpoints and errors."""

from pathlib import Path

import pytest
import torch

from blueberry_video.models.autoencoder.causal_vae import CausalConv, CausalVideoVAE


def vae(**changes) -> CausalVideoVAE:
    torch.manual_seed(0)
    model = CausalVideoVAE(**{"channels": 4, "dims": (8, 12, 16), **changes})
    for parameter in model.parameters():  # residual blocks are initialized to zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "stride", "frames"),
    [
        ({}, (4, 8, 8), 9),
        ({"time_stride": 2}, (2, 8, 8), 7),
        ({"time_stride": 1, "patch_size": 1}, (1, 4, 4), 5),
        ({"dims": (8, 8), "patch_size": 4, "time_stride": 2}, (2, 8, 8), 1),
    ],
)
def test_sizes(changes: dict, stride: tuple[int, int, int], frames: int):
    model = vae(**changes)
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    moments = model.encode(video)
    assert model.stride == stride
    assert moments.shape == (2, 8, *model.grid(frames, 16, 24))
    assert model.decode(model.latents(moments)).shape == video.shape


def test_no_frame_changes_an_earlier_latent():
    model, video = vae(), torch.rand(1, 3, 13, 16, 16) * 2 - 1
    before = model.encode(video)
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        differs = (model.encode(changed) != before).flatten(3).any(dim=(0, 1, 3))
        group = -(-frame // 4)  # frames 1 to 4 are encoded in latent 1
        assert not differs[:group].any()
        assert differs[group]


def test_no_latent_changes_an_earlier_frame():
    model, latents = vae(), torch.randn(1, 4, 4, 2, 2)
    before = model.reconstruct(latents)
    for index in range(4):
        changed = latents.clone()
        changed[:, :, index] += 1
        differs = (model.reconstruct(changed) != before).flatten(3).any(dim=(0, 1, 3))
        first = 0 if index == 0 else 4 * index - 3
        assert not differs[:first].any()
        assert differs[first : 4 * index + 1].all()


@pytest.mark.parametrize("stride", [1, 2])
def test_causal_conv_equals_a_padded_conv3d(stride: int):
    conv = CausalConv(5, 7, time_stride=stride)
    x = torch.randn(2, 5, 9, 6, 4)
    out, frames = conv(x.transpose(1, 2).flatten(0, 1), 9)
    weight = conv.taps.weight.unflatten(1, (3, 5)).transpose(1, 2)  # (D, C, 3, 3, 3)
    padded = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    expected = torch.nn.functional.conv3d(padded, weight, conv.taps.bias, stride=(stride, 1, 1), padding=(0, 1, 1))
    assert frames == expected.shape[2]
    torch.testing.assert_close(out.unflatten(0, (2, frames)).transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_signal_exceeds_the_noise_of_latents_at_initialization():
    torch.manual_seed(0)
    model = CausalVideoVAE(channels=8, dims=(16, 32, 64))
    clip = torch.randn(2, 3, 1, 4, 4).repeat_interleave(9, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    mean, log_variance = model.encode(clip).chunk(2, dim=1)
    assert mean.std() > 2 * (log_variance / 2).exp().mean()
    assert model.reconstruct(mean).std() > 0.3 * clip.std()


def test_every_parameter_receives_a_gradient():
    model = vae().train()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    moments = model.encode(video)
    (model.reconstruct(model.latents(moments)) - video).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()


def test_latents_have_unit_variance_and_round_trip():
    model = vae()
    raw = torch.randn(64, 4, 3, 4, 4) * torch.tensor([0.1, 1, 5, 20]).view(-1, 1, 1, 1) + 2
    for _ in range(2000):
        model.track(raw)
    scaled = model.normalize(raw)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-2)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3, 4)), torch.ones(4), rtol=0, atol=1e-2)
    latents = raw[:2, :, :2, :2, :2]
    torch.testing.assert_close(
        model.decode(model.normalize(latents)), model.reconstruct(latents).clamp(-1, 1), rtol=0, atol=1e-5
    )


def test_weights_round_trip_through_a_checkpoint(tmp_path: Path):
    model = vae()
    model.track(torch.randn(2, 4, 1, 2, 2))
    file = tmp_path / "step.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, file)
    other = CausalVideoVAE(4, (8, 12, 16), weights=file)
    video = torch.rand(1, 3, 5, 8, 8)
    assert torch.equal(
        other.latents(other.encode(video), torch.Generator().manual_seed(0)),
        model.latents(model.encode(video), torch.Generator().manual_seed(0)),
    )
    with pytest.raises(ValueError, match=r"(?s)step\.ckpt.*CausalVideoVAE.*\b5\b.*decoder\.0\.taps\.weight"):
        vae(channels=8).load_published(file)


def test_time_stride_out_of_range_raises():
    with pytest.raises(ValueError, match=r"time_stride=8\b.*\b2\b.*\b3\b.*\b1, 2, 4\b"):
        vae(time_stride=8)


def test_invalid_num_frames_raises():
    with pytest.raises(ValueError, match=r"num_frames=8\b(?=.*CausalVideoVAE).*\b4\b.*\b9\b.*\b5\b"):
        vae().encode(torch.zeros(1, 3, 8, 16, 16))
