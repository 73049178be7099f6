"""Noise of a camera: its size, its independence, and that it is a function of seed, epoch and clip."""

from typing import ClassVar

import pytest
import torch

from blueberry_video.data.sensor_noise import SensorNoise
from blueberry_video.data.world import World


class Gray(torch.utils.data.Dataset):
    classes: ClassVar = {"shape": ("a", "b")}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        return {
            "video": torch.full((40, 3, 16, 16), 128, dtype=torch.uint8),
            "id": f"gray-{index}",
            "depth": torch.ones(40, 16, 16),
        }


def test_noise_has_the_stated_size_and_is_independent_between_frames() -> None:
    clip = SensorNoise(Gray(), sigma=0.1, exposure=0.0)[0]
    noise = clip["video"].double() - 128
    assert noise.std() == pytest.approx(25.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.5
    pairs = (noise[1:] * noise[:-1]).mean() / noise.square().mean()
    assert abs(float(pairs)) < 0.02
    assert torch.equal(clip["depth"], torch.ones(40, 16, 16))


def test_exposure_scales_whole_frames() -> None:
    frames = SensorNoise(Gray(), sigma=0.0, exposure=0.1)[0]["video"].double().flatten(1)
    assert frames.std(1).max() == 0
    assert frames.mean(1).std() == pytest.approx(12.8, rel=0.4)


def test_a_share_of_the_blocks_of_each_frame_is_lost() -> None:
    class White(Gray):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "video": torch.full((40, 3, 20, 18), 255, dtype=torch.uint8)}

    video = SensorNoise(White(), sigma=0.0, lost=0.3, block=8)[0]["video"]
    lost = video == 128
    assert ((video == 255) | lost).all()
    assert torch.equal(lost[:, :1].expand_as(lost), lost)  # all channels
    corners = lost[:, 0, ::8, ::8]
    assert corners.shape == (40, 3, 3)
    assert torch.equal(corners.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :20, :18], lost[:, 0])
    assert corners.float().mean() == pytest.approx(0.3, abs=0.08)
    assert (corners[1:] != corners[:-1]).any()


def test_noise_is_a_function_of_seed_epoch_and_clip() -> None:
    noisy = SensorNoise(Gray())
    first = noisy.sample(0, 0)["video"]
    assert torch.equal(first, SensorNoise(Gray())[0]["video"])
    for changed in (noisy.sample(0, 1), noisy.sample(1, 0), SensorNoise(Gray(), seed=1)[0]):
        assert not torch.equal(first, changed["video"])
    assert noisy.classes == Gray.classes
    assert noisy.varies_by_epoch


def test_no_noise_leaves_the_clip() -> None:
    world = World("val", 1, 2, 16)
    assert torch.equal(SensorNoise(world, 0.0, 0.0)[0]["video"], world[0]["video"])


@pytest.mark.parametrize(
    ("key", "value"), [("sigma", -0.1), ("sigma", 1.5), ("exposure", 2.0), ("lost", -1.0), ("block", 0)]
)
def test_values_out_of_range_raise(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key}={value}"):
        SensorNoise(Gray(), **{key: value})
