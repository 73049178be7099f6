"""Published autoencoders: parity with diffusers in latents, scales and layouts, on tiny random models."""

import sys
from pathlib import Path

import pytest
import torch

from blueberry_video.models.autoencoder.pretrained import PretrainedVAE

diffusers = pytest.importorskip("diffusers")

COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
}
HUNYUAN = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
HUNYUAN15 = {"block_out_channels": (8, 16, 16, 16, 16), "latent_channels": 4, "layers_per_block": 1}
KINDS = {
    "AutoencoderKLCogVideoX": (COGVIDEOX, (4, 8, 8), 8),
    "AutoencoderKLHunyuanVideo": (HUNYUAN, (4, 8, 8), 4),
    "AutoencoderKLHunyuanVideo15": (HUNYUAN15, (4, 16, 16), 4),
}


def save(folder: Path, kind: str, **changes) -> str:
    torch.manual_seed(0)
    getattr(diffusers, kind)(**{**KINDS[kind][0], **changes}).save_pretrained(folder / "vae")
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_videos_equal_diffusers(tmp_path: Path, kind: str):
    autoencoder = PretrainedVAE(save(tmp_path, kind)).train()
    vae = getattr(diffusers, kind).from_pretrained(tmp_path / "vae").eval()
    _, stride, step = KINDS[kind]
    assert (autoencoder.channels, autoencoder.stride, autoencoder.frame_step) == (4, stride, step)
    video = torch.rand(1, 3, step + 1, 2 * stride[1], stride[2]) * 2 - 1
    with torch.no_grad():
        distribution = vae.encode(video).latent_dist
        expected = distribution.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
        decoded = vae.decode(expected / vae.config.scaling_factor).sample.clamp(-1, 1)
    moments = autoencoder.encode(video)
    assert moments.shape == (1, 8, *autoencoder.grid(*video.shape[2:]))
    latents = autoencoder.latents(moments, torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, rtol=0, atol=1e-5)
    assert torch.equal(autoencoder.image_latents(moments, torch.Generator().manual_seed(3)), latents)
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert not autoencoder.vae.training


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_a_batch_are_encoded_and_decoded_independently(tmp_path: Path, kind: str):
    autoencoder = PretrainedVAE(save(tmp_path, kind))
    _, stride, step = KINDS[kind]
    video = torch.rand(2, 3, step + 1, 2 * stride[1], stride[2]) * 2 - 1
    moments = autoencoder.encode(video)
    alone = torch.cat([autoencoder.encode(clip) for clip in video.split(1)])
    torch.testing.assert_close(moments, alone, rtol=0, atol=1e-4)
    decoded = autoencoder.decode(moments[:, :4])
    alone = torch.cat([autoencoder.decode(part) for part in moments[:, :4].split(1)])
    torch.testing.assert_close(decoded, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sample_size", [(64, 64), (96, 72), (150, 100)])
def test_tiles_keep_the_size_of_videos(tmp_path: Path, sample_size: tuple[int, int]):
    """Tiles of 32 x 32 pixels are 4 x 4 latents, of which a sixth or a fifth overlap: no whole number."""
    height, width = sample_size
    folder = save(tmp_path, "AutoencoderKLCogVideoX", sample_height=height, sample_width=width)
    autoencoder = PretrainedVAE(folder, tiling=True)
    for rows, columns in ((8, 11), (13, 7)):
        moments = autoencoder.encode(torch.rand(1, 3, 1, 8 * rows, 8 * columns))
        assert moments.shape[3:] == (rows, columns)
        assert autoencoder.decode(moments[:, :4]).shape[3:] == (8 * rows, 8 * columns)


def test_published_tiles_are_those_of_diffusers(tmp_path: Path):
    vae = PretrainedVAE(save(tmp_path, "AutoencoderKLCogVideoX"), tiling=True).vae
    assert (vae.tile_sample_min_height, vae.tile_latent_min_width) == (240, 45)
    assert (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width) == (1 / 6, 1 / 5)


def test_images_of_cogvideox_15_are_divided_by_the_scale(tmp_path: Path):
    autoencoder = PretrainedVAE(save(tmp_path, "AutoencoderKLCogVideoX", invert_scale_latents=True), frame_step=16)
    moments = torch.randn(1, 8, 1, 2, 2)
    image, latents = (
        encode(moments, torch.Generator().manual_seed(0)) for encode in (autoencoder.image_latents, autoencoder.latents)
    )
    torch.testing.assert_close(image, latents / 0.7**2, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"num_frames=85\b(?=.*PretrainedVAE).*\b16\b.*\b81\b.*\b97\b"):
        autoencoder.check(85, 768, 1360)


def test_missing_or_invalid_autoencoder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"(?s)autoencoder.*nowhere/vae"):
        PretrainedVAE(str(tmp_path / "nowhere"))
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"(?s)AutoencoderKL\b.*AutoencoderKLCogVideoX.*AutoencoderKLHunyuanVideo15"):
        PretrainedVAE(str(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"(?s)diffusers.*pip install -e .*\[pretrained\]"):
        PretrainedVAE(str(tmp_path))
