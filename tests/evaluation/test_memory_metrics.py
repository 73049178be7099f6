"""Reader of the object of a clip: accuracy on real, degraded and empty clips, positions, overlap of masks, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.data import scene
from blueberry_video.data.memory_world import MemoryWorld
from blueberry_video.evaluation.memory_metrics import (
    CHANCE,
    COLOURS,
    NONE,
    SHAPES,
    SIZES,
    Objects,
    accuracies,
    mask_overlap,
    read_objects,
)

COUNT = 60


@pytest.fixture(scope="module", params=[64, 32])
def real(request: pytest.FixtureRequest) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the last two frames of clips of the world, (N, 3, 2, H, W) in [-1, 1], and their labels."""
    world = MemoryWorld("test", COUNT, 6, request.param, unseen=1, seen=2)
    clips = [world[i] for i in range(COUNT)]
    video = torch.stack([clip["video"][4:] for clip in clips]).transpose(1, 2).float() / 127.5 - 1
    return video, {name: torch.tensor([clip["labels"][name] for clip in clips]) for name in CHANCE}


def degraded(video: Tensor) -> Tensor:
    """Blurs clips and adds noise that is the same in all frames, to a PSNR of 26 dB."""
    frames = video.transpose(1, 2).flatten(0, 1)
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = (0.6 * frames + 0.4 * blurred).unflatten(0, (len(video), -1)).transpose(1, 2)
    left = 4 * 10**-2.6 - (blurred - video).square().mean().item()
    noise = torch.randn(len(video), 3, 1, *video.shape[3:], generator=torch.Generator().manual_seed(0))
    made = blurred + left**0.5 * noise
    assert 10 * (4 / (made - video).square().mean()).log10() == pytest.approx(26, abs=0.2)
    return made


def test_classes_are_those_of_the_world():
    assert COLOURS == scene.COLOURS
    assert list(COLOURS) == list(scene.COLOURS)
    assert (scene.SHAPES, tuple(scene.SIZES)) == (SHAPES, SIZES)
    assert MemoryWorld().classes == {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}


def test_accuracy_on_real_and_degraded_clips(real):
    video, labels = real
    least = 0.85 if video.shape[-1] == 64 else 0.7
    for clips in (video, degraded(video)):
        shares = accuracies(read_objects(clips), labels)
        assert (shares["colour"], shares["size"]) == (1, 1)
        assert shares["shape"] > least


def test_clips_without_an_object_have_no_class(real):
    gray = real[0].mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    noise = torch.rand(gray.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for clips in (gray, degraded(gray), noise):
        found = read_objects(clips)
        assert all((getattr(found, name) == NONE).all() for name in CHANCE)
        assert found.center.isnan().all()
        assert not found.mask.any()


def test_two_colours_are_not_one_class():
    video = torch.zeros(1, 3, 2, 16, 16)
    video[:, 0, :, 4:12, 4:8] = 1  # red
    video[:, 1:, :, 4:12, 8:12] = 1  # cyan
    assert read_objects(video).colour.item() == NONE
    video[:, :, :, :, 8:12] = 0
    assert list(COLOURS)[read_objects(video).colour] == "red"


def test_center_and_mask_of_a_square():
    video = torch.zeros(2, 3, 1, 32, 32)
    video[0, 2, :, 6:14, 18:26] = 1
    video[1, 2, :, 6:14, 10:18] = 1
    found = read_objects(video)
    assert found.center.tolist() == [pytest.approx([22 / 32, 10 / 32]), pytest.approx([14 / 32, 10 / 32])]
    assert found.mask[0].nonzero().aminmax(dim=0)[0].tolist() == [5, 17]  # with a rim of one pixel
    assert found.mask[0].sum() == 100 - 12  # the blur rounds the corners


def test_overlap_of_masks():
    def objects(mask: Tensor) -> Objects:
        return Objects(*[torch.zeros(len(mask))] * 3, torch.zeros(len(mask), 2), mask)

    first, second = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    first[0, 0, :3], second[0, 0, 1:] = True, True
    assert mask_overlap(objects(first), objects(second)) == pytest.approx(2 / 4)
    assert mask_overlap(objects(first), objects(first)) == 1
    assert mask_overlap(objects(first), objects(torch.zeros_like(first))) == 0
    assert mask_overlap(objects(torch.zeros_like(first)), objects(torch.zeros_like(first))) == 0


def test_a_reading_does_not_depend_on_the_batch_and_values_are_clamped(real):
    video, _ = real
    together, alone = read_objects(video[:3]), read_objects(video[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))
    assert torch.equal(read_objects(video * 1.0).colour, read_objects(video.double()).colour)
    beyond = torch.where(video > 0.99, video + 5, video)
    assert torch.equal(read_objects(beyond.clamp(-1, 1)).mask, read_objects(beyond).mask)


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (1, 1, 2, 8, 8), (1, 3, 0, 8, 8)])
def test_other_shapes_raise(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}, {shape[2]}.*\(N, 3, T, H, W\)"):
        read_objects(torch.zeros(shape))
