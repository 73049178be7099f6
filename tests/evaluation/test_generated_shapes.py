"""GeneratedShapes callback on perfect, constant and noise generators."""

from types import SimpleNamespace

import pytest
import torch

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.evaluation.generated_shapes import GeneratedShapes

CLIPS = {
    clip["caption"]: clip["video"].transpose(0, 1).float() / 127.5 - 1
    for clip in map(MovingShapes("train", 1).__getitem__, range(36))
}


def test_a_perfect_generator_scores_one_and_shuffled_frames_lose_the_direction():
    prompts = []

    def generate(captions, generator):
        prompts.extend(captions)
        return torch.stack([CLIPS[caption] for caption in captions])

    found = GeneratedShapes(clips=72, batch_size=30).measure(SimpleNamespace(generate=generate))
    assert (found["colour"], found["shape"], found["direction"]) == (1, 1, 1)
    assert found["direction_shuffled"] < 0.45
    assert (found["colour_trivial"], found["shape_trivial"], found["direction_trivial"]) == (1 / 3, 1 / 3, 1 / 4)
    for name, chance in (("colour", 1 / 3), ("shape", 1 / 3), ("direction", 1 / 4)):
        assert found[f"{name}_shuffled_captions"] == pytest.approx(chance, abs=0.15)
    assert sorted(prompts) == sorted([*CLIPS] * 2)


def test_a_generator_that_ignores_its_captions_is_at_chance_level():
    same = next(iter(CLIPS.values()))
    found = GeneratedShapes(36, 36).measure(
        SimpleNamespace(generate=lambda captions, _: same.expand(len(captions), -1, -1, -1, -1))
    )
    assert (found["colour"], found["shape"], found["direction"]) == pytest.approx((1 / 3, 1 / 3, 1 / 4))


def test_noise_scores_below_chance_level():
    noise = lambda captions, generator: torch.randn(len(captions), 3, 8, 16, 16, generator=generator)  # noqa: E731
    found = GeneratedShapes(36, 36).measure(SimpleNamespace(generate=noise))
    assert found["shape"] <= 1 / 3
    assert found["direction"] <= 1 / 4


@pytest.mark.parametrize("clips", [0, 35, 40])
def test_clips_that_are_no_multiple_of_the_captions_raise(clips: int):
    with pytest.raises(ValueError, match=rf"callbacks\.sampling\.clips={clips}\b.*\b36\b"):
        GeneratedShapes(clips)
