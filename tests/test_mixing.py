"""MixUp and CutMix: the share of the labels equals that of the pixels."""

import pytest
import torch

from blueberry_video.augmentation import Mixing, soft_targets

MIXUP, CUTMIX = Mixing(cutmix_alpha=0.0), Mixing(mixup_alpha=0.0)


def batch(size: int = 4, frames: int = 3, height: int = 20, width: int = 30) -> torch.Tensor:
    """Clips of the constant values 1, 2, 4, 8, …, so that the shares of a mixture follow from its pixels."""
    return (2.0 ** torch.arange(size)).view(-1, 1, 1, 1, 1).expand(size, 3, frames, height, width).contiguous()


def share_of(mixed: torch.Tensor, own: float, other: float) -> torch.Tensor:
    """Share of ``own`` in each pixel of a clip that holds the values ``own`` and ``other``, or a mean of both."""
    return (mixed - other) / (own - other)


def test_mixup_returns_the_share_of_the_weighted_sum():
    torch.manual_seed(0)
    shares = []
    for _ in range(20):
        video, own = MIXUP(batch())
        for clip, value in enumerate((1, 2, 4, 8)):
            share = share_of(video[clip], value, 8 / value)
            torch.testing.assert_close(share, torch.full_like(share, own), atol=1e-4, rtol=0)
        shares.append(own)
    assert len(set(shares)) == 20
    assert all(0 <= share <= 1 for share in shares)


def test_cutmix_returns_the_share_of_kept_pixels():
    torch.manual_seed(0)
    shares, cut_off = [], 0
    for _ in range(60):
        video, own = CUTMIX(batch())
        for clip, value in enumerate((1, 2, 4, 8)):
            kept = video[clip] == value
            assert torch.equal(kept, kept[:1, :1].expand_as(kept))
            assert torch.equal(~kept, video[clip] == 8 / value)
            assert kept.float().mean().item() == pytest.approx(own, abs=1e-6)
        hole = ~kept[0, 0]
        assert hole.any(1).sum() * hole.any(0).sum() == hole.sum()  # a rectangle
        cut_off += bool(hole[0].any() or hole[-1].any())
        shares.append(own)
    assert cut_off > 5  # boxes at the edge count with the pixels inside the frame
    assert len(set(shares)) > 30


@pytest.mark.parametrize(("alpha", "variance"), [(0.8, 1 / (4 * 2.6)), (1.0, 1 / 12)])
def test_shares_have_the_variance_of_their_beta_distribution(alpha, variance):
    torch.manual_seed(0)
    mixing, video = Mixing(mixup_alpha=alpha, cutmix_alpha=0.0), batch(2, 1, 1, 1)
    shares = torch.tensor([mixing(video)[1] for _ in range(3000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.var().item() == pytest.approx(variance, rel=0.07)


def test_mixup_cutmix_and_unmixed_batches_have_the_given_probabilities():
    torch.manual_seed(0)
    mixing, video = Mixing(switch_prob=0.3, prob=0.8), batch()
    counts = {"none": 0, "cut": 0, "up": 0}
    for _ in range(1500):
        mixed, own = mixing(video)
        is_whole = torch.isin(mixed, torch.tensor([1.0, 2.0, 4.0, 8.0])).all()
        counts["none" if mixed is video else "cut" if is_whole else "up"] += 1
        assert (mixed is video) <= (own == 1)
    assert counts["none"] / 1500 == pytest.approx(0.2, abs=0.03)
    assert counts["cut"] / 1500 == pytest.approx(0.8 * 0.3, abs=0.035)


def test_mixing_is_seeded_and_not_in_place():
    video, mixing = batch(), Mixing()
    torch.manual_seed(3)
    first = mixing(video)
    torch.manual_seed(3)
    second = mixing(video)
    assert first[1] == second[1]
    assert torch.equal(first[0], second[0])
    assert torch.equal(video, batch())


def test_single_frames_and_odd_batches_are_mixed():
    torch.manual_seed(0)
    for mixing in (MIXUP, CUTMIX):
        video, _ = mixing(batch(3, frames=1))
        assert video.shape == (3, 3, 1, 20, 30)
        assert torch.allclose(video[1], torch.tensor(2.0))  # the middle clip is mixed with itself


def test_targets_equal_the_formula():
    """Targets are smoothed labels (``on`` and ``off``), weighted by the share of each clip."""
    labels, own, smoothing, classes = torch.tensor([0, 2, 2, 1]), 0.7, 0.1, 5
    targets = soft_targets(labels, classes, own, smoothing)
    off = smoothing / classes
    on = 1 - smoothing + off
    for clip in range(4):
        for name in range(classes):
            own_target = on if labels[clip] == name else off
            partner_target = on if labels[3 - clip] == name else off
            assert targets[clip, name].item() == pytest.approx(own * own_target + (1 - own) * partner_target, abs=1e-6)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))


def test_targets_of_unmixed_clips_are_one_hot():
    labels = torch.tensor([2, 0])
    assert soft_targets(labels, 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mixup_alpha": -0.1}, r"mixing\.mixup_alpha=-0\.1\b.*mixing\.cutmix_alpha=1\.0"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, r"mixup_alpha=0\.0.*cutmix_alpha=0\.0.*task\.mixing=null"),
        ({"prob": 1.2}, r"mixing\.prob=1\.2\b.*\[0, 1\]"),
        ({"switch_prob": -1.0}, r"mixing\.switch_prob=-1\.0\b.*\[0, 1\]"),
    ],
)
def test_bad_arguments_raise(options, text):
    with pytest.raises(ValueError, match=text):
        Mixing(**options)
