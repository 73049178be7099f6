"""Metrics of depth: values of independent numpy versions in float64, exact cases, invariances, and bad input."""

import math

import numpy as np
import pytest
import torch

from blueberry_video.data.world import World
from blueberry_video.evaluation.depth_metrics import (
    aligned_depth,
    depth_accuracy,
    disparity_of,
    flicker,
    temporal_alignment_error,
)

SHAPE = (3, 4, 6, 7)
BAD = [0.0, -1.0, math.nan, math.inf]  # invalid depth


def random_depth(seed: int, shape: tuple[int, ...] = SHAPE, invalid: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(shape, generator=generator, dtype=torch.float64) * 4 + 1
    if invalid:
        chosen = torch.randint(4, shape, generator=generator)
        depth = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.tensor(BAD).double()[chosen], depth)
    return depth


def is_valid(depth: np.ndarray) -> np.ndarray:
    return np.isfinite(depth) & (depth > 0)


@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("max_depth", [None, 3.0])
def test_alignment_equals_lstsq(by_image: bool, max_depth: float | None):
    prediction, depth = random_depth(0, invalid=False), random_depth(1)
    found = aligned_depth(prediction, depth, max_depth, by_image).numpy()
    groups = (
        [(b, slice(t, t + 1)) for b in range(3) for t in range(4)] if by_image else [(b, slice(0, 4)) for b in range(3)]
    )
    for b, frames in groups:
        p, d = prediction[b, frames].numpy(), depth[b, frames].numpy()
        valid = is_valid(d)
        columns = np.stack([p[valid], np.ones(valid.sum())], axis=1)
        scale, shift = np.linalg.lstsq(columns, 1 / d[valid], rcond=None)[0]
        expected = 1 / np.clip(scale * p + shift, 1e-3 if max_depth is None else 1 / max_depth, None)
        np.testing.assert_allclose(found[b, frames], expected, rtol=1e-9)


def test_alignment_inverts_every_affine_map_of_the_disparity():
    depth = random_depth(2)
    valid = torch.from_numpy(is_valid(depth.numpy()))
    found = aligned_depth(0.3 * disparity_of(depth) + 7, depth)
    torch.testing.assert_close(found[valid], depth[valid])
    found = aligned_depth((0.3 * disparity_of(depth) + 7).float(), depth.float())  # a shift much above the range
    torch.testing.assert_close(found[valid], depth[valid].float(), rtol=1e-4, atol=1e-4)


def test_a_negative_scale_is_not_hidden():
    depth = random_depth(3, invalid=False)
    torch.testing.assert_close(aligned_depth(-disparity_of(depth), depth), depth)


def test_accuracy_equals_numpy():
    predicted, depth = random_depth(4, invalid=False), random_depth(5)
    found = depth_accuracy(predicted, depth)
    for b in range(3):
        valid = is_valid(depth[b].numpy())
        p, d = predicted[b].numpy()[valid], depth[b].numpy()[valid]
        assert found.abs_rel[b].item() == pytest.approx(np.mean(np.abs(p - d) / d), rel=1e-12)
        assert found.delta1[b].item() == pytest.approx(np.mean(np.maximum(p / d, d / p) < 1.25), rel=1e-12)
        assert found.rmse[b].item() == pytest.approx(np.sqrt(np.mean((p - d) ** 2)), rel=1e-12)
    assert 0 < found.delta1.min() < 0.9


def test_delta1_excludes_the_threshold_and_negative_predictions():
    depth = torch.full((1, 1, 1, 4), 4.0, dtype=torch.float64)
    predicted = torch.tensor([5.0, 4.99, 3.2, -4.0], dtype=torch.float64).view(1, 1, 1, 4)
    assert depth_accuracy(predicted, depth).delta1.item() == 0.25


def test_clips_without_valid_pixels_are_nan_and_change_no_other():
    predicted, depth = random_depth(6, invalid=False), random_depth(7)
    depth[1] = 0
    found = depth_accuracy(aligned_depth(predicted, depth), depth)
    for values in (*found, flicker(predicted, depth)):
        assert values.isnan().tolist() == [False, True, False]
    alone = depth_accuracy(aligned_depth(predicted[2:], depth[2:]), depth[2:])
    torch.testing.assert_close(found.abs_rel[2:], alone.abs_rel)


def looped_tae(predicted, depth, intrinsics, poses, tolerance) -> float:
    """TAE of one clip, pixel by pixel."""
    k = intrinsics
    height, width = depth.shape[1:]
    errors = []
    for t in range(len(depth) - 1):
        for i, j in ((t, t + 1), (t + 1, t)):
            move = np.linalg.inv(poses[j]) @ poses[i]
            found = []
            for row in range(height):
                for column in range(width):
                    results = []
                    for maps in (predicted, depth):
                        ray = np.array([(column + 0.5 - k[0, 2]) / k[0, 0], (row + 0.5 - k[1, 2]) / k[1, 1], 1, 0])
                        point = move @ (ray * maps[i, row, column] + [0, 0, 0, 1])
                        u = k[0, 0] * point[0] / point[2] + k[0, 2]
                        v = k[1, 1] * point[1] / point[2] + k[1, 2]
                        hit = point[2] > 0 and 0 <= u < width and 0 <= v < height
                        x, y = (int(u), int(v)) if hit else (0, 0)
                        valid = hit and is_valid(depth[j, y, x]) and is_valid(depth[i, row, column])
                        results.append((valid, abs(point[2] - maps[j, y, x]) / maps[j, y, x] if valid else 0))
                    (seen, error), (truth_seen, truth_error) = results
                    if seen and (tolerance is None or (truth_seen and truth_error <= tolerance)):
                        found.append(error)
            if found:
                errors.append(np.mean(found))
    return 100 * float(np.mean(errors))


@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_tae_equals_a_loop_over_pixels(tolerance: float | None):
    generator = torch.Generator().manual_seed(0)
    predicted, depth = random_depth(8, (2, 3, 5, 6), invalid=False), random_depth(9, (2, 3, 5, 6))
    depth[~torch.from_numpy(is_valid(depth.numpy()))] = 0
    intrinsics = torch.tensor([[6.0, 0, 3.1], [0, 5, 2.4], [0, 0, 1]], dtype=torch.float64).expand(2, 3, 3)
    turn = torch.linalg.matrix_exp(0.1 * (lambda a: a - a.mT)(torch.randn(2, 3, 3, 3, generator=generator).double()))
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    poses[..., :3, :3], poses[..., :3, 3] = turn, 0.3 * torch.randn(2, 3, 3, generator=generator)
    found = temporal_alignment_error(predicted, depth, intrinsics, poses, tolerance)
    for b in range(2):
        arrays = (each[b].numpy() for each in (predicted, depth, intrinsics, poses))
        assert found[b].item() == pytest.approx(looped_tae(*arrays, tolerance), rel=1e-9)


def world_clip() -> dict:
    clip = World("val", 1, num_frames=8, image_size=48, camera="orbit", supersample=1)[0]
    return {key: clip[key][None] for key in ("depth", "intrinsics", "poses")}


def test_tae_of_the_ground_truth_of_the_world_is_small_and_that_of_wrong_poses_is_not():
    clip = world_clip()
    floor = temporal_alignment_error(clip["depth"], **clip, occlusion_tolerance=0.05).item()
    assert floor < 0.7
    assert floor < temporal_alignment_error(clip["depth"], **clip).item()
    wrong = {**clip, "poses": clip["poses"].flip(1)}
    assert temporal_alignment_error(clip["depth"], **wrong).item() > 3 * floor
    scales = torch.tensor([1.0, 1.1] * 4).view(1, 8, 1, 1)
    assert temporal_alignment_error(clip["depth"] * scales, **clip, occlusion_tolerance=0.05).item() > 8
    assert temporal_alignment_error(clip["depth"] * 1.1, **clip, occlusion_tolerance=0.05).item() < 5


def test_tae_of_one_frame_is_nan():
    clip = {key: value[:, :1] if key != "intrinsics" else value for key, value in world_clip().items()}
    assert temporal_alignment_error(clip["depth"], **clip).isnan().all()
    assert flicker(clip["depth"], clip["depth"]).isnan().all()


def test_flicker_equals_numpy_and_is_zero_for_the_ground_truth():
    predicted, depth = random_depth(10, invalid=False), random_depth(11)
    depth[:, 1:] = torch.where(torch.rand(3, 3, 6, 7) < 0.5, depth[:, :-1] * 1.01, depth[:, 1:])
    found = flicker(predicted, depth, static=0.05)
    for b in range(3):
        p, d = predicted[b].numpy(), depth[b].numpy()
        errors = []
        for t, i, j in np.ndindex(3, 6, 7):
            before, after = d[t, i, j], d[t + 1, i, j]
            if is_valid(before) and is_valid(after) and abs(after - before) / before < 0.05:
                errors.append(abs(p[t + 1, i, j] - p[t, i, j] - after + before) / before)
        assert found[b].item() == pytest.approx(100 * np.mean(errors), rel=1e-12)
    assert flicker(depth, depth, static=0.05).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: aligned_depth(d[0], d[0]), r"\(4, 6, 7\)"),
        (lambda d: depth_accuracy(d, d[:, :1]), r"\(3, 4, 6, 7\).*\(3, 1, 6, 7\)"),
        (lambda d: aligned_depth(d, d, 0.0), r"max_depth=0\.0\b"),
        (lambda d: flicker(d, d, 0), r"static=0\b"),
        (lambda d: temporal_alignment_error(d, d, torch.eye(3), torch.eye(4)), r"\(3, 3\).*\(3, 4, 4, 4\)"),
    ],
)
def test_wrong_arguments_raise(call, match: str):
    with pytest.raises(ValueError, match=match):
        call(random_depth(0))
