"""Gaussian noise: seeded draws that do not depend on the target device."""

import torch

from blueberry_video.nn.noise import standard_normal


def test_noise_is_drawn_on_the_device_of_the_generator():
    shape, cpu = (2, 3, 4), torch.device("cpu")
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(standard_normal(shape, torch.Generator().manual_seed(0), cpu), expected)
    assert standard_normal(shape, torch.Generator(), torch.device("meta")).device.type == "meta"
    torch.manual_seed(0)
    assert torch.equal(standard_normal(shape, None, cpu), expected)
