"""Gaussian noise: seeded draws that do not depend on the target device."""

import pytest
import torch

from blueberry_video.nn.noise import clip_generators, standard_normal


def test_noise_is_drawn_on_the_device_of_the_generator():
    shape, cpu = (2, 3, 4), torch.device("cpu")
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(standard_normal(shape, torch.Generator().manual_seed(0), cpu), expected)
    assert standard_normal(shape, torch.Generator(), torch.device("meta")).device.type == "meta"
    torch.manual_seed(0)
    assert torch.equal(standard_normal(shape, None, cpu), expected)


def test_noise_of_a_clip_depends_on_its_own_generator():
    seeded = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    both = standard_normal((2, 3, 4), seeded(5, 6), torch.device("cpu"))
    for index, seed in enumerate((5, 6)):
        assert torch.equal(both[index], torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))[0])
    with pytest.raises(ValueError, match=r"2 generators\b.*\b3 clips"):
        standard_normal((3, 4), seeded(5, 6), torch.device("cpu"))


def test_generators_of_clips_do_not_depend_on_the_batch_size():
    draw = lambda generator, *sizes: [  # noqa: E731
        each.initial_seed() for size in sizes for each in clip_generators(generator, size)
    ]
    together, apart = (draw(torch.Generator().manual_seed(3), *sizes) for sizes in ((5,), (2, 3)))
    assert together == apart
    assert len(set(together)) == 5
