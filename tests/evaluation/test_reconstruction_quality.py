"""PSNR, SSIM and reconstructions without a network."""

import pytest
import torch

from blueberry_video.evaluation.reconstruction import psnr, ssim, trivial_reconstructions


def test_psnr_has_known_values():
    video = torch.zeros(2, 3, 1, 2, 2)
    assert psnr(video + 0.02, video).tolist() == pytest.approx([40, 40], abs=1e-3)  # 1% of the range
    assert psnr(video + 5, video + 1).min() > 99  # both clamp to 1
    apart = torch.stack([video[0] + 0.02, video[1] + 0.2])
    assert psnr(apart, video).tolist() == pytest.approx([40, 20], abs=1e-3)


def test_ssim_of_each_clip_equals_its_formula():
    torch.manual_seed(0)
    video = torch.rand(2, 3, 2, 16, 16) * 2 - 1
    assert ssim(video, video).tolist() == pytest.approx([1, 1])
    shifted = video * torch.tensor([0.5, 1.0]).view(2, 1, 1, 1, 1)
    values = ssim(shifted, video)
    assert values[1].item() == pytest.approx(1)
    assert values[0] < 0.9
    # constant images: only the luminance term, with C1 = (0.01 · range)²
    flat = torch.full((1, 3, 1, 16, 16), 0.5)
    expected = (2 * 0.5 * 0.25 + 0.02**2) / (0.5**2 + 0.25**2 + 0.02**2)
    assert ssim(flat / 2, flat).item() == pytest.approx(expected, rel=1e-4)


def test_trivial_reconstructions():
    video = torch.randn(2, 3, 5, 4, 8)
    made = trivial_reconstructions(video, (2, 2, 4))
    assert all(baseline.shape == video.shape for baseline in made.values())
    for clip, other in zip(video, made["blocks"]):
        torch.testing.assert_close(other[:, 0, 2:, :4], clip[:, 0, 2:, :4].mean((1, 2))[:, None, None].expand(-1, 2, 4))
        torch.testing.assert_close(
            other[:, 3:, :2, 4:], clip[:, 3:, :2, 4:].mean((1, 2, 3))[:, None, None, None].expand(-1, 2, 2, 4)
        )
    still = video[:, :, :1].expand_as(video)
    torch.testing.assert_close(trivial_reconstructions(still, (2, 2, 4))["still"], still)
    torch.testing.assert_close(made["mean"][1, 2], video[1, 2].mean().expand(5, 4, 8))
