"""Losses of Depth Anything: values of independent numpy versions in float64, invariances, gradients and bad input."""

import numpy as np
import pytest
import torch

from blueberry_video.models.depth_anything import losses

SHAPE = (3, 12, 10)


def maps(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def some(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def numpy_normalized(values: np.ndarray) -> np.ndarray:
    """(d - median) / mean |d - median| of a list of values, with the lower median."""
    middle = np.sort(values)[(len(values) - 1) // 2]
    return (values - middle) / np.abs(values - middle).mean()


def test_affine_invariant_loss():
    predicted, target, valid = maps(0), maps(1), some(2)
    expected = []
    for p, t, v in zip(predicted.numpy(), target.numpy(), valid.numpy()):
        expected.append(np.abs(numpy_normalized(p[v]) - numpy_normalized(t[v])).mean())
    found = losses.affine_invariant_loss(predicted, target, valid)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_affine_invariant_loss_without_the_largest_differences():
    predicted, target, valid = maps(0), maps(1), some(2)
    expected = []
    for p, t, v in zip(predicted.numpy(), target.numpy(), valid.numpy()):
        differences = np.sort(np.abs(numpy_normalized(p[v]) - numpy_normalized(t[v])))
        expected.append(differences[: len(differences) - int(0.2 * len(differences))].mean())
    found = losses.affine_invariant_loss(predicted, target, valid, trim=0.2)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.01, 5.0), (100.0, -7.0)])
def test_scale_and_shift_do_not_change_invariant_losses(scale: float, shift: float):
    predicted, target, valid = maps(0), maps(1), some(2)
    changed = scale * predicted + shift
    for loss in (losses.affine_invariant_loss, lambda *a: losses.affine_invariant_loss(*a, trim=0.1)):
        torch.testing.assert_close(loss(changed, target, valid), loss(predicted, target, valid))
        torch.testing.assert_close(loss(predicted, scale * target + shift, valid), loss(predicted, target, valid))
    mask = some(3)
    pasted = losses.mixed_pseudo_label_loss(predicted, target, maps(4), valid, mask)
    torch.testing.assert_close(
        losses.mixed_pseudo_label_loss(changed, scale * target + shift, maps(4), valid, mask), pasted
    )
    clip, truth, known = maps(5, (2, 4, 6, 5)), maps(6, (2, 4, 6, 5)), some(7, (2, 4, 6, 5))
    torch.testing.assert_close(
        losses.temporal_gradient_matching_loss(scale * clip + shift, truth, known, 0.3),
        losses.temporal_gradient_matching_loss(clip, truth, known, 0.3),
    )
    torch.testing.assert_close(
        losses.silog_loss(scale * predicted, target, valid, 1.0), losses.silog_loss(predicted, target, valid, 1.0)
    )


def test_gradient_matching_loss():
    predicted, target, valid = maps(0), maps(1), some(2)
    expected = 0.0
    for scale in range(3):
        step = 2**scale
        r, v = (predicted - target).numpy()[:, ::step, ::step], valid.numpy()[:, ::step, ::step]
        down = np.abs(r[:, 1:] - r[:, :-1])[v[:, 1:] & v[:, :-1]].sum()
        right = np.abs(r[:, :, 1:] - r[:, :, :-1])[v[:, :, 1:] & v[:, :, :-1]].sum()
        expected += (down + right) / v.sum()
    assert losses.gradient_matching_loss(predicted, target, valid, 3).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        losses.gradient_matching_loss(target + 3, target, valid), torch.zeros((), dtype=torch.float64)
    )


def test_mixed_pseudo_labels_are_normalized_inside_and_outside_the_rectangle():
    predicted, first, second, valid = maps(0), maps(1), maps(2), some(3)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 2:7, 3:9] = True
    expected = []
    for p, a, b, v, m in zip(*(each.numpy() for each in (predicted, first, second, valid, mask))):
        inside = np.abs(numpy_normalized(p[v & m]) - numpy_normalized(a[v & m])).mean()
        outside = np.abs(numpy_normalized(p[v & ~m]) - numpy_normalized(b[v & ~m])).mean()
        expected.append(m.mean() * inside + (1 - m.mean()) * outside)
    found = losses.mixed_pseudo_label_loss(predicted, first, second, valid, mask)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_mixed_pseudo_labels_without_the_largest_differences():
    predicted, first, second, valid = maps(0), maps(1), maps(2), some(3)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 2:7, 3:9] = True
    expected = []
    for p, a, b, v, m in zip(*(each.numpy() for each in (predicted, first, second, valid, mask))):
        parts = []
        for label, region in ((a, m), (b, ~m)):
            differences = np.sort(np.abs(numpy_normalized(p[v & region]) - numpy_normalized(label[v & region])))
            parts.append(region.mean() * differences[: len(differences) - int(0.2 * len(differences))].mean())
        expected.append(sum(parts))
    found = losses.mixed_pseudo_label_loss(predicted, first, second, valid, mask, trim=0.2)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_feature_alignment_ignores_similar_tokens():
    features, frozen = maps(0, (2, 5, 4)) - 0.6, maps(1, (2, 5, 4)) - 0.6
    a, b = features.numpy(), frozen.numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert 0 < (cosine > 0.3).sum() < cosine.size
    expected = (1 - cosine[cosine <= 0.3]).mean()
    assert losses.feature_alignment_loss(features, frozen, 0.3).item() == pytest.approx(expected, rel=1e-12)
    assert losses.feature_alignment_loss(features, 2 * features).item() == 0


def test_silog_loss():
    predicted, target, valid = maps(0), maps(1), some(2)
    g = np.log(predicted.numpy()[valid.numpy()]) - np.log(target.numpy()[valid.numpy()])
    expected = np.sqrt((g**2).mean() - 0.5 * g.mean() ** 2)
    assert losses.silog_loss(predicted, target, valid).item() == pytest.approx(expected, rel=1e-12)


def test_temporal_gradient_matching_loss():
    predicted, target, valid = maps(0, (2, 4, 6, 5)), maps(1, (2, 4, 6, 5)), some(2, (2, 4, 6, 5))
    total, count = 0.0, 0
    for p, t, v in zip(predicted.numpy(), target.numpy(), valid.numpy()):
        design = np.stack([p[v], np.ones(v.sum())], axis=1)
        scale, shift = np.linalg.lstsq(design, t[v], rcond=None)[0]
        aligned, change = scale * p + shift, np.diff(t, axis=0)
        used = v[1:] & v[:-1] & (np.abs(change) < 0.3 * (t[v].max() - t[v].min()))
        total, count = total + np.abs(np.diff(aligned, axis=0) - change)[used].sum(), count + used.sum()
    found = losses.temporal_gradient_matching_loss(predicted, target, valid, 0.3)
    assert found.item() == pytest.approx(total / count, rel=1e-10)


def test_least_squares_alignment_of_degenerate_maps():
    predicted = torch.stack([torch.full((4,), 3.0), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(4)]).double()
    target = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).expand(3, -1)
    valid = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    scale, shift = losses.least_squares_alignment(predicted, target, valid)
    torch.testing.assert_close(scale, torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shift, torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64))


def every_loss(predicted: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> list[torch.Tensor]:
    mask = torch.zeros_like(valid)
    mask[:, :5] = True
    return [
        losses.affine_invariant_loss(predicted, target, valid),
        losses.affine_invariant_loss(predicted, target, valid, trim=0.1),
        losses.gradient_matching_loss(predicted, target, valid),
        losses.mixed_pseudo_label_loss(predicted, target, maps(4), valid, mask),
        losses.silog_loss(predicted, target, valid),
        losses.temporal_gradient_matching_loss(predicted[:, None], target[:, None], valid[:, None]),
    ]


@pytest.mark.parametrize("case", ["invalid", "one_pixel", "constant", "equal", "infinite"])
def test_degenerate_maps_have_finite_losses_and_gradients(case: str):
    predicted, target, valid = maps(0).requires_grad_(), maps(1), some(2)
    if case == "invalid":
        valid = torch.zeros_like(valid)
    elif case == "one_pixel":
        valid = torch.zeros_like(valid)
        valid[:, 0, 0] = True
    elif case == "constant":
        predicted, target = torch.ones(SHAPE).double().requires_grad_(), torch.ones(SHAPE).double()
    elif case == "equal":
        target = predicted.detach().clone()
    else:
        target = torch.where(valid, target, torch.inf)
    for index, loss in enumerate(every_loss(predicted, target, valid)):
        assert torch.isfinite(loss), (case, index)
        [gradient] = torch.autograd.grad(loss, predicted, retain_graph=True, allow_unused=True)
        assert gradient is None or torch.isfinite(gradient).all(), (case, index)
        if case == "invalid":
            assert loss == 0


def test_gradients_are_those_of_finite_differences():
    target, valid = maps(1), some(2)
    predicted = maps(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: tuple(every_loss(p, target, valid)), predicted, atol=1e-6)


def test_bad_input_raises():
    predicted, target, valid = maps(0), maps(1), some(2)
    with pytest.raises(ValueError, match=r"\(3, 12, 10\).*\(3, 12, 9\)"):
        losses.affine_invariant_loss(predicted, target[..., :9], valid)
    with pytest.raises(ValueError, match=r"float64"):
        losses.gradient_matching_loss(predicted, target, target)
    for key, value, call in (
        ("trim", 1.0, lambda v: losses.affine_invariant_loss(predicted, target, valid, v)),
        ("scales", 0, lambda v: losses.gradient_matching_loss(predicted, target, valid, v)),
        ("variance_focus", 1.5, lambda v: losses.silog_loss(predicted, target, valid, v)),
        (
            "threshold",
            0.0,
            lambda v: losses.temporal_gradient_matching_loss(predicted[:, None], target[:, None], valid[:, None], v),
        ),
    ):
        with pytest.raises(ValueError, match=rf"{key}={value}"):
            call(value)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        losses.feature_alignment_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 4))
