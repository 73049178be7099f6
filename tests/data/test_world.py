"""Procedural world: labels, depth, poses and actions match the images, and trajectories reverse exactly."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.raycast import AMBIENT, FLOOR_GREYS, LIGHT, SHADOW, render
from blueberry_video.data.scene import (
    ACTIONS,
    ARENA,
    CAMERAS,
    COLOURS,
    FOV,
    HALF_HEIGHT,
    MOTIONS,
    SHAPES,
    SIZES,
    STEP,
    State,
    camera_poses,
    caption,
    draw_scene,
    push,
    random_actions,
    trajectory,
)
from blueberry_video.data.world import PRESETS, SPLITS, Simulator, World

OPPOSITE = {"left": "right", "away": "towards", "cw": "ccw"} | {"right": "left", "towards": "away", "ccw": "cw"}
SKY, FLOOR, OBJECT_0 = 0, 1, 2
SCENES = World("val", 400, num_frames=9, image_size=32, camera=list(CAMERAS), supersample=1)


def scenes_of(motion: str, count: int, world: World = SCENES) -> list[int]:
    """Returns the indices of the first clips with this motion."""
    found = (i for i in range(world.size) if world.scene(i).motion == motion)
    return [next(found) for _ in range(count)]


def world_points(depth: Tensor, pose: Tensor) -> np.ndarray:
    """Returns the world coordinates (H, W, 3) of every pixel of a frame, by unprojection."""
    size = depth.shape[-1]
    focal = size / 2 / np.tan(0.6911 / 2)
    slope = (np.arange(size) + 0.5 - size / 2) / focal
    rays = np.stack([*np.meshgrid(slope, slope), np.ones((size, size))], axis=-1)
    matrix = pose.numpy().astype(float)
    return (rays * depth.numpy().astype(float)[..., None]) @ matrix[:3, :3].T + matrix[:3, 3]


def inside(points: np.ndarray, shape: str, radius: float, centre: np.ndarray, yaw: float) -> np.ndarray:
    """Returns True for points (..., 3) inside an object."""
    x, y, z = np.moveaxis(points - centre, -1, 0)
    if shape == "sphere":
        return x**2 + y**2 + z**2 < radius**2
    if shape == "cylinder":
        return (x**2 + y**2 < radius**2) & (np.abs(z) < radius)
    half = radius / 2**0.5
    along, across = np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x
    return (np.abs(along) < half) & (np.abs(across) < half) & (np.abs(z) < half)


def objects_of(sample: dict, frame: int) -> list[tuple[str, float, np.ndarray, float]]:
    objects = sample["objects"]
    return [
        (shape, SIZES[size], objects["centres"][frame, k].numpy(), float(objects["yaw"][k]))
        for k, (shape, size) in enumerate(zip(objects["shape"], objects["size"]))
    ]


PINNED = [  # clips without numbers near a rounding threshold
    ("train", 8, {}, "b5f54b0533b22db0"),
    ("val", 36, {"camera": "orbit", "min_objects": 3}, "6d6635c53734e2b9"),
    ("test", 8, {"mode": "agent", "supersample": 1}, "060ecd69b88e0976"),
]


# Clips


@pytest.mark.parametrize("mode", ["motion", "agent"])
def test_clip_format(mode):
    world = World("train", 50, num_frames=5, image_size=24, camera=list(CAMERAS), mode=mode)
    clips = [world[i] for i in range(4)]
    batch = default_collate(clips)
    assert (batch["video"].shape, batch["video"].dtype) == ((4, 5, 3, 24, 24), torch.uint8)
    assert (batch["depth"].shape, batch["depth"].dtype) == ((4, 5, 24, 24), torch.float32)
    assert (batch["seg"].shape, batch["seg"].dtype) == ((4, 5, 24, 24), torch.uint8)
    assert (batch["intrinsics"].shape, batch["poses"].shape) == ((4, 3, 3), (4, 5, 4, 4))
    assert batch["poses"].dtype == batch["intrinsics"].dtype == torch.float32
    assert batch["id"] == [f"world-train-{i}" for i in range(4)]
    assert clips[0]["fps"] == 8
    assert set(batch["labels"]) == set(world.classes)
    for label, names in world.classes.items():
        assert all(0 <= clip["labels"][label] < len(names) for clip in clips)
    if mode == "agent":
        assert (batch["actions"].shape, batch["actions"].dtype) == ((4, 4), torch.int64)
        assert (batch["states"].shape, batch["states"].dtype) == ((4, 5, 2), torch.float32)
    assert ("motion" in world.classes) == ("motion" in world.reversal_pairs) == (mode == "motion")
    assert ("actions" in batch) == (mode == "agent")


def test_sample_has_all_views_and_the_clip_is_the_first():
    world = World("train", 5, num_frames=3, image_size=24, camera="rig4")
    sample, clip = world.sample(2), world[2]
    assert sample["video"].shape == (4, 3, 3, 24, 24)
    assert sample["depth"].shape == sample["valid"].shape == sample["seg"].shape == (4, 3, 24, 24)
    assert (sample["K"].shape, sample["c2w"].shape) == ((4, 3, 3), (4, 3, 4, 4))
    assert sample["time"].tolist() == [0, 0.5, 1]
    assert torch.equal(sample["valid"], sample["depth"] > 0)
    for of_sample, of_clip in (("video", "video"), ("depth", "depth"), ("seg", "seg"), ("c2w", "poses")):
        assert torch.equal(sample[of_sample][0], clip[of_clip])
    assert torch.equal(sample["K"][3], clip["intrinsics"])
    assert len({view.numpy().tobytes() for view in sample["video"]}) == 4


def digest(sample: dict) -> str:
    """Returns a hash of a sample, rounded so that it does not depend on the machine."""
    blocks = sample["video"].float().unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((-1, -3)) / 8
    depth = sample["depth"].unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((-1, -3)) * 10
    numbers = [sample["objects"]["centres"] * 1000, sample["c2w"] * 1000, blocks, depth]
    text = json.dumps([sample["caption"], sample["labels"], sample.get("actions", torch.empty(0)).tolist()])
    arrays = b"".join(values.round().to(torch.int32).numpy().tobytes() for values in numbers)
    return hashlib.sha256(text.encode() + arrays).hexdigest()[:16]


@pytest.mark.parametrize(("split", "index", "options", "expected"), PINNED)
def test_samples_match_the_pinned_hashes(split, index, options, expected):
    """A changed hash changes all results: increase the number in cache_key as well."""
    assert digest(World(split, 100, num_frames=4, image_size=32, **options).sample(index)) == expected


def test_clip_depends_only_on_split_and_index():
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    options = {"num_frames": 4, "image_size": 16}
    small, large = World("train", 10, **options), World("train", 500, **options)
    large[499]
    for i in (7, 3, 7):
        assert small[i]["video"].equal(large[i]["video"])
        assert small[i]["caption"] == large[i]["caption"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    videos = {World(split, 5, **options)[i]["video"].numpy().tobytes() for split in SPLITS for i in range(5)}
    assert len(videos) == 15


def test_presets_change_only_the_resolution():
    tiny, base = World("test", 5, **PRESETS["tiny"], supersample=1), World("test", 5, **PRESETS["base"])
    assert (tiny[0]["video"].shape, PRESETS["small"]) == ((8, 3, 32, 32), {"num_frames": 16, "image_size": 64})
    for i in range(5):
        assert caption(tiny.scene(i)) == caption(base.scene(i))
        ends = [trajectory(world.scene(i), world.num_frames)[[0, -1]] for world in (tiny, base)]
        assert np.array_equal(*ends)


def test_clips_do_not_depend_on_num_workers():
    world = World("train", 6, num_frames=3, image_size=16, camera="orbit")
    batches = list(DataLoader(world, batch_size=3, num_workers=2))
    expected = torch.stack([world[i]["video"] for i in range(6)])
    assert torch.equal(torch.cat([batch["video"] for batch in batches]), expected)


def test_cache_key_differs_if_clips_differ(tmp_path):
    different = [
        {},
        {"split": "val"},
        {"num_frames": 8},
        {"image_size": 32},
        {"min_objects": 2},
        {"max_objects": 2},
        {"camera": "orbit"},
        {"camera": ["static", "orbit"]},
        {"mode": "agent"},
        {"supersample": 1},
    ]
    keys = {World(**{"split": "train", **options}).cache_key for options in different}
    assert len(keys) == len(different)
    assert World("train", 5).cache_key == World("train", 9).cache_key
    assert World(camera=["orbit"]).cache_key == World(camera="orbit").cache_key
    world = World("train", 3, num_frames=3, image_size=16, mode="agent")
    cached = CachedClips(world, tmp_path)
    assert cached.classes == world.classes
    assert cached[1].keys() == world[1].keys()
    assert all(torch.equal(cached[1][key], value) for key, value in world[1].items() if isinstance(value, Tensor))


# Time reversal


@pytest.mark.parametrize("motion", ["left", "away", "cw"])
@pytest.mark.parametrize("camera", [camera for camera in CAMERAS if camera != "dnerf"])
@pytest.mark.parametrize("num_frames", [8, 5])
def test_opposite_motion_is_the_reversed_clip(motion, camera, num_frames):
    """Bit-identical in trajectories, poses and pixels: otherwise a single frame could reveal the motion."""
    [index] = scenes_of(motion, 1)
    scene = replace(SCENES.scene(index), camera=camera)
    opposite = replace(scene, motion=OPPOSITE[motion], sweep=-scene.sweep)
    path, poses = trajectory(scene, num_frames), camera_poses(scene, num_frames)
    back, poses_back = trajectory(opposite, num_frames), camera_poses(opposite, num_frames)
    assert np.array_equal(path, back[::-1])
    assert not np.array_equal(path, back)
    assert np.array_equal(poses, poses_back[:, ::-1])
    for forwards, backwards in zip(render(scene, path, poses[0], 24), render(opposite, back, poses_back[0], 24)):
        assert np.array_equal(forwards, backwards[::-1])


def test_reversal_pairs_exclude_motions_that_are_their_own_reversal():
    pairs = {frozenset(tuple(MOTIONS)[i] for i in pair) for pair in SCENES.reversal_pairs["motion"]}
    assert pairs == {frozenset(pair) for pair in OPPOSITE.items()}
    for motion in ("still", "hop"):
        path = trajectory(SCENES.scene(scenes_of(motion, 1)[0]), 8)
        assert np.array_equal(path, path[::-1])


def test_camera_sweep_is_independent_of_the_motion():
    scenes = [SCENES.scene(i) for i in range(SCENES.size)]
    assert {scene.motion for scene in scenes} == set(MOTIONS)
    for motion, opposite in (("left", "right"), ("away", "towards"), ("cw", "ccw")):
        sweeps = [[s.sweep for s in scenes if s.motion == m] for m in (motion, opposite)]
        assert all(abs(np.mean(values)) < 0.45 for values in sweeps)  # each about 50 draws: three standard deviations
        assert 0.6 < len(sweeps[0]) / len(sweeps[1]) < 1.67


# Motions and captions


def seen_centre(clip: dict) -> np.ndarray:
    """Returns the mean column, row and depth of object 0, (T, 3)."""
    mask = (clip["seg"] == OBJECT_0).numpy()
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]]
    return np.array([[np.mean(v[m]) for v in (columns, rows, d)] for m, d in zip(mask, clip["depth"].numpy())])


@pytest.mark.parametrize(
    ("motion", "coordinate", "sign"), [("left", 0, -1), ("right", 0, 1), ("away", 2, 1), ("towards", 2, -1)]
)
def test_directions_match_the_images(motion, coordinate, sign):
    world = World("test", 100, num_frames=5, image_size=48, max_objects=1, supersample=1)
    for index in scenes_of(motion, 3, world):
        steps = sign * np.diff(seen_centre(world[index])[1:-1, coordinate])
        assert (steps > (2 if coordinate == 0 else 0.15)).all(), index


def test_still_hop_and_circles():
    world = World("test", 100, num_frames=9, image_size=48, max_objects=1, supersample=1)
    for index in scenes_of("still", 2, world):
        assert (world[index]["video"] == world[index]["video"][:1]).all()
    for index in scenes_of("hop", 2, world):
        row = seen_centre(world[index])[:, 1]  # increases downwards
        assert row[2] < row[0] - 3
        assert row[4] == row[0] == row[8]
    for motion, turn in (("cw", -1), ("ccw", 1)):
        for index in scenes_of(motion, 2, world):
            path = trajectory(world.scene(index), 9)[:, 0]
            x, y = (path - path[:-1].mean(0))[:, :2].T  # seen from above, with z towards the viewer
            assert (np.sign(x[:-1] * y[1:] - y[:-1] * x[1:]) == turn).all()
            assert np.allclose(np.hypot(x, y), 0.5)
            assert np.allclose(path[0], path[-1])


def test_straight_paths_are_1_6_meters_and_objects_stay_in_the_arena_without_collisions():
    for i in range(120):
        scene = SCENES.scene(i)
        path = trajectory(scene, 33)
        if scene.motion in ("left", "right", "away", "towards"):
            assert np.linalg.norm(path[-1, 0] - path[0, 0]) == pytest.approx(1.6)
            assert np.allclose(path[16, 0], scene.rest[0])
        assert np.abs(path[..., :2]).max() <= ARENA + 1e-9
        for k in range(len(scene.rest)):
            assert scene.rest[k, 2] == SIZES[scene.sizes[k]] * HALF_HEIGHT[scene.shapes[k]]
            others = np.delete(np.arange(len(scene.rest)), k)
            gaps = np.linalg.norm(path[:, others, :2] - path[:, k, None, :2], axis=-1)
            assert (gaps > scene.radii[others] + scene.radii[k]).all()


def test_labels_and_caption_match_the_scene():
    world = World("train", 60, num_frames=3, image_size=48, camera=list(CAMERAS), max_objects=1, supersample=1)
    seen = set()
    for i in range(60):
        clip, objects = world[i], world.sample(i)["objects"]
        name = {label: names[clip["labels"][label]] for label, names in world.classes.items()}
        assert [objects[key][0] for key in ("shape", "colour", "size")] == [
            name[k] for k in ("shape", "colour", "size")
        ]
        subject = (
            f"a {name['size']} {name['colour']} {name['shape']} {MOTIONS[name['motion']]} on a checkered floor while "
        )
        assert clip["caption"] == subject + CAMERAS[name["camera"]]
        pixels = clip["video"].permute(0, 2, 3, 1)[clip["seg"] == OBJECT_0].float().numpy()
        hue = pixels.mean(0) / np.linalg.norm(pixels.mean(0))
        similarity = {colour: hue @ rgb / np.linalg.norm(rgb) for colour, rgb in COLOURS.items()}
        assert max(similarity, key=lambda colour: similarity[colour]) == name["colour"]
        seen |= set(name.items())
    assert len(seen) == sum(len(names) for names in world.classes.values())  # every class of every label occurs
    scene = replace(
        world.scene(0), sizes=("large",), colours=("red",), shapes=("sphere",), motion="left", camera="orbit"
    )
    assert caption(scene) == "a large red sphere moves left on a checkered floor while the camera orbits"


def test_vocabulary_size():
    scenes = [
        replace(SCENES.scene(0), shapes=(shape,), colours=(colour,), sizes=(size,), motion=motion, camera=camera)
        for shape in SHAPES for colour in COLOURS for size in SIZES for motion in MOTIONS for camera in CAMERAS
    ]  # fmt: skip
    words = {word for scene in scenes for mode in ("motion", "agent") for word in caption(scene, mode).split()}
    assert 30 <= len(words) <= 40


# Rendering


def first_met(points: np.ndarray, objects: list) -> tuple[np.ndarray, np.ndarray]:
    """Returns by ray marching the index of the first object (-1: none) along rays sampled at points (..., S, 3), and
    the index of the sample."""
    hits = np.stack([inside(points, *thing) for thing in objects])  # (N, ..., S)
    at = np.where(hits.any(-1), hits.argmax(-1), points.shape[-2])
    return np.where(at.min(0) < points.shape[-2], at.argmin(0), -1), at.min(0)


@pytest.mark.parametrize("index", range(6))
def test_depth_seg_and_shadows_match_ray_marching(index):
    size, step = 32, 0.005
    world = World("val", 10, num_frames=2, image_size=size, min_objects=3, camera="dnerf", supersample=1)
    sample = world.sample(index)
    objects = objects_of(sample, 1)
    seg, depth, video, pose = (sample[key][0, 1] for key in ("seg", "depth", "video", "c2w"))
    eye, unit = pose[:3, 3].numpy(), world_points(torch.ones(size, size), pose)
    rays = (unit - eye).astype(np.float32)
    ways = np.arange(1.5, 6.5, step, dtype=np.float32)
    met, at = first_met(eye + rays[..., None, :] * ways[:, None], objects)
    floor = -eye[2] / rays[..., 2]
    on_floor = (floor > 0) & (np.abs(eye + floor[..., None] * rays)[..., :2].max(-1) <= 4)
    assert np.mean(np.where(met >= 0, met + OBJECT_0, on_floor) == seg.numpy()) > 0.995  # ray marching misses thin rims
    both = (met >= 0) & (seg.numpy() >= OBJECT_0)
    assert both.sum() > 20
    assert np.quantile(np.abs(ways[at[both]] - depth.numpy()[both]), 0.98) < 2 * step
    ground = seg.numpy() == FLOOR
    assert np.allclose(depth.numpy()[ground], floor[ground], rtol=1e-5)

    points = world_points(depth, pose)[ground]
    light = np.array([0.4, -0.5, 0.77]) / np.linalg.norm([0.4, -0.5, 0.77])
    dark = first_met(points[:, None] + light * np.arange(0, 2.5, 0.01)[:, None], objects)[0] >= 0
    tile = (np.floor(points[:, 0] / 0.5) + np.floor(points[:, 1] / 0.5)).astype(int) % 2
    expected = np.array(FLOOR_GREYS)[tile] * (AMBIENT + (1 - AMBIENT) * light[2] * np.where(dark, SHADOW, 1))
    seen = video.permute(1, 2, 0).numpy()[ground].astype(int)
    assert (seen == seen[:, :1]).all()  # the floor is grey
    assert np.mean(np.abs(seen[:, 0] - 255 * expected) < 1) > 0.985
    assert 0.005 < dark.mean() < 0.5


def test_only_the_white_sky_has_no_depth():
    for i in range(12):
        sample = SCENES.sample(i)
        sky = sample["seg"] == SKY
        assert torch.equal(~sky, sample["valid"])
        assert torch.equal(sky, (sample["video"] == 255).all(2))
        assert sky.any()
        assert int(sample["seg"].max()) < OBJECT_0 + len(sample["objects"]["shape"])
        assert (sample["seg"] == OBJECT_0).any()
        assert sample["depth"][sample["valid"]].min() > 1.5
        assert sample["depth"].max() < 10


def test_brightness_depends_on_the_angle_to_the_light():
    """Three faces of one box."""
    scene = replace(
        SCENES.scene(0), shapes=("box",), colours=("red",), sizes=("large",), motion="still", azimuth=np.pi / 4,
        yaw=np.zeros(1), rest=np.array([[0, 0, 0.4 / 2**0.5]]), camera="static",
    )  # fmt: skip
    poses = camera_poses(scene, 2)[0, :1]  # from +x +y: the faces +x, +y (away from the light) and +z are visible
    video, depth, seg = render(scene, scene.rest[None], poses, 96)
    points = world_points(torch.from_numpy(depth[0]), torch.from_numpy(poses[0]))
    half = 0.4 / 2**0.5
    for axis, cosine in ((0, LIGHT[0]), (1, 0.0), (2, LIGHT[2])):
        height = points[..., axis] - scene.rest[0, axis]
        face = (seg[0] == OBJECT_0) & (np.abs(height - half) < 1e-4)
        assert face.sum() > 50
        bright = 255 * COLOURS["red"][0] * (AMBIENT + (1 - AMBIENT) * cosine)
        assert {round(bright), round(0.7 * bright)} == set(video[0, 0][face].tolist())


@pytest.mark.parametrize("camera", ["orbit", "dolly", "dnerf", "pan"])
def test_depth_and_poses_warp_one_frame_to_another(camera):
    world = World("train", 10, num_frames=5, image_size=96, camera=camera, supersample=1)
    errors = []
    for index in range(3):
        sample = world.sample(index)
        depth, seg, poses, K = (sample[key][0] for key in ("depth", "seg", "c2w", "K"))
        for start, end in ((0, 1), (3, 2), (0, 4)):
            points = world_points(depth[start], poses[start])
            centres = sample["objects"]["centres"].numpy()
            moved = np.concatenate([np.zeros((2, 3)), centres[end] - centres[start]])  # sky and floor, then objects
            valid = (seg[start] != SKY).numpy()
            points = (points + moved[seg[start].long().numpy()])[valid]
            seen = (points - poses[end][:3, 3].numpy()) @ poses[end][:3, :3].numpy()
            x, y, z = K.numpy() @ seen.T
            column, row = np.floor(x / z).astype(int), np.floor(y / z).astype(int)
            visible = (column >= 0) & (column < 96) & (row >= 0) & (row < 96)
            target = depth[end].numpy()[row[visible], column[visible]]
            error = np.abs(target - z[visible]) / z[visible]
            errors.append(np.median(error[target > 0]))
            assert visible.mean() > 0.2
    assert max(errors) < 0.01, errors


def test_supersampling_averages_colours_but_not_depth_and_seg():
    options = {"num_frames": 3, "camera": "orbit"}
    fine = World("val", 3, image_size=64, supersample=1, **options)[2]
    plain = World("val", 3, image_size=32, supersample=1, **options)[2]
    smooth = World("val", 3, image_size=32, supersample=2, **options)[2]
    mean = fine["video"].float().unflatten(-1, (32, 2)).unflatten(-3, (32, 2)).mean((-1, -3))
    assert (smooth["video"].float() - mean).abs().max() <= 0.5
    assert torch.equal(smooth["depth"], plain["depth"])
    assert torch.equal(smooth["seg"], plain["seg"])
    assert not torch.equal(smooth["video"], plain["video"])


# Cameras


@pytest.mark.parametrize("camera", list(CAMERAS))
def test_camera_positions_and_directions(camera):
    world = World("train", 20, num_frames=7, camera=camera)
    for i in range(20):
        poses = camera_poses(world.scene(i), 7)
        assert poses.shape == (4 if camera == "rig4" else 1, 7, 4, 4)
        turn, position = poses[..., :3, :3], poses[..., :3, 3] - [0, 0, 0.3]
        assert np.allclose(turn @ turn.swapaxes(-1, -2), np.eye(3))
        assert np.allclose(np.linalg.det(turn), 1)
        assert np.allclose(turn[..., 2, 0], 0), "the horizon must be level"
        assert (turn[..., 2, 1] < 0).all(), "down in the image must be down in the world"
        distance = np.linalg.norm(position, axis=-1)
        assert 3.6 - 1e-9 <= distance.min() <= distance.max() <= 4.4 + 1e-9
        elevation = np.degrees(np.arcsin(position[..., 2] / distance))
        assert elevation.min() >= 20 - 1e-9
        assert elevation.max() <= 45 + 1e-9
        towards = -position / distance[..., None]
        azimuth = np.unwrap(np.arctan2(position[..., 1], position[..., 0]))
        straight = (turn[..., 2] * towards).sum(-1)
        assert np.allclose(straight, 1) or camera == "pan"
        moves = {"position": np.ptp(position, axis=1).max() > 0.1, "turn": np.ptp(turn, axis=1).max() > 0.1}
        assert moves == {"position": camera in ("orbit", "dolly", "dnerf"), "turn": camera in ("orbit", "pan", "dnerf")}
        if camera == "orbit":
            assert np.degrees(np.abs(azimuth[0, -1] - azimuth[0, 0])) == pytest.approx(60)
        if camera == "dolly":
            assert np.sort(distance[0, [0, -1]]) == pytest.approx([3.6, 4.4])
        if camera == "rig4":
            assert np.allclose(position.sum(0)[..., :2], 0)
            assert np.allclose((position[0] * position[1]).sum(-1), position[0, :, 2] ** 2)  # at 90° intervals


def test_worlds_with_different_cameras_share_scenes():
    for i in range(5):
        static, moving = (World("train", 5, camera=camera).scene(i) for camera in ("static", ["orbit", "rig4"]))
        assert np.array_equal(static.rest, moving.rest)
        assert (static.motion, static.azimuth, static.shapes) == (moving.motion, moving.azimuth, moving.shapes)


# Agent


def test_actions_move_object_0_in_the_directions_of_the_camera():
    world = World("train", 60, num_frames=12, image_size=16, mode="agent", supersample=1)
    ways = np.array([[0, 0], [-STEP, 0], [STEP, 0], [0, STEP], [0, -STEP]])
    assert ACTIONS == ("noop", "left", "right", "away", "towards")
    whole = blocked = 0
    for i in range(60):
        scene, clip, centres = world.scene(i), world[i], world.sample(i)["objects"]["centres"].numpy()
        assert (centres[:, 1:] == centres[:1, 1:]).all()
        assert np.allclose(clip["states"].numpy(), centres[:, 0, :2] @ scene.axes.T, atol=1e-6)
        moved = np.diff(clip["states"].numpy(), axis=0)
        free = np.isclose(moved, ways[clip["actions"].numpy()], atol=1e-6).all(1)
        whole += free.sum()
        for t in np.flatnonzero(~free):
            blocked += 1
            at_wall = np.abs(centres[t + 1, 0, :2]).max() > ARENA - 1e-6
            wanted = centres[t, 0, :2] + scene.axes.T @ ways[clip["actions"][t]]
            gaps = np.linalg.norm(centres[0, 1:, :2] - wanted, axis=-1) - scene.radii[1:] - scene.radii[0]
            assert at_wall or ((gaps < 0).any() and (moved[t] == 0).all())
        assert np.abs(centres[..., :2]).max() <= ARENA + 1e-6
    assert whole > 500
    assert blocked > 10


def test_actions_are_visible_in_the_image():
    simulator = Simulator(image_size=64, max_objects=1, supersample=1)
    for action, coordinate, sign in (("left", 0, -1), ("right", 0, 1), ("away", 1, -1), ("towards", 1, 1)):
        start = simulator.reset((0, 3))
        for _ in range(3):
            end = simulator.step(ACTIONS.index(action))
        middles = []
        for state in (start, end):
            frame = simulator.render(state)
            coloured = (frame.amax(0).int() - frame.amin(0).int() > 60).nonzero().float()
            middles.append(coloured.mean(0).flip(0))
        assert sign * (middles[1] - middles[0])[coordinate] > 2


def test_arena_and_objects_limit_the_agent():
    scene = replace(draw_scene((0, 0), "agent", 2, 2, ["static"]), azimuth=-np.pi / 2)  # right is +x, away is +y
    right = ACTIONS.index("right")
    scene.rest[1, :2] = [0.0, 1.1]
    at = np.array([ARENA - 0.04, -0.5])
    assert push(scene, at, right) == pytest.approx([ARENA, -0.5])
    assert push(scene, push(scene, at, right), right) == pytest.approx([ARENA, -0.5])
    gap = scene.radii.sum()
    scene.rest[1, :2] = [0.5, 0.0]
    near, clear = np.array([0.5 - gap - 0.05, 0.0]), np.array([0.5 - gap - 0.15, 0.0])
    assert np.array_equal(push(scene, near, right), near)
    assert push(scene, clear, right) == pytest.approx(clear + np.array([0.1, 0]))
    with pytest.raises(ValueError, match=r"action=5\b.*\b4\b.*noop, left, right, away, towards"):
        push(scene, near, 5)


def test_random_policy_repeats_three_of_four_actions():
    actions = np.array([random_actions(draw_scene((1, i), "agent", 1, 1, ["static"]), 100) for i in range(100)])
    repeated = (actions[:, 1:] == actions[:, :-1]).mean()
    assert repeated == pytest.approx(0.75 + 0.25 / 5, abs=0.015)  # a new draw may repeat the action
    assert np.bincount(actions.ravel()) / actions.size == pytest.approx(np.full(5, 0.2), abs=0.03)
    assert len({row.tobytes() for row in actions}) == 100


def test_simulator_replays_a_clip():
    world = World("val", 10, num_frames=6, image_size=24, mode="agent")
    simulator = Simulator(image_size=24)
    with pytest.raises(RuntimeError, match=r"call reset\(seed\) before step"):
        simulator.step(0)
    clip = world[4]
    states = [simulator.reset((SPLITS["val"], 4)), *(simulator.step(action) for action in clip["actions"].tolist())]
    assert torch.equal(torch.stack([simulator.render(state) for state in states]), clip["video"])
    assert np.allclose([state.vector for state in states], clip["states"])
    simulator.state = states[2]
    assert np.array_equal(simulator.step(int(clip["actions"][2])).position, states[3].position)
    assert isinstance(simulator.state, State)


# D-NeRF


@pytest.mark.parametrize("camera", ["dnerf", "rig4"])
def test_dnerf_round_trip(tmp_path, camera):
    world = World("train", 5, num_frames=3, image_size=32, camera=camera)
    world.export_dnerf(1, tmp_path)
    sample = world.sample(1)
    read = {}
    for split in ("train", "val", "test"):
        scene = json.loads((tmp_path / f"transforms_{split}.json").read_text())
        assert scene["camera_angle_x"] == FOV
        read[split] = np.array([frame["transform_matrix"] for frame in scene["frames"]])
        for frame in scene["frames"]:
            assert Image.open(tmp_path / f"{frame['file_path']}.png").size == (32, 32)
        assert [frame["time"] for frame in scene["frames"]] == [0, 0.5, 1] * (len(scene["frames"]) // 3)
    frames = json.loads((tmp_path / "transforms_train.json").read_text())["frames"]
    views = sample["c2w"].flatten(0, 1).numpy()
    assert np.allclose(read["train"] @ np.diag([1, -1, -1, 1]), views, atol=1e-6)
    for frame, video, valid in zip(frames, sample["video"].flatten(0, 1), sample["valid"].flatten(0, 1)):
        image = Image.open(tmp_path / f"{frame['file_path']}.png")
        assert image.mode == "RGBA"
        rgba = np.asarray(image)
        assert set(np.unique(rgba[..., 3])) == {0, 255}
        assert (rgba[..., 3][valid.numpy()] == 255).all()
        over_white = np.where(rgba[..., 3:] == 255, rgba[..., :3], 255)
        assert np.array_equal(over_white, video.permute(1, 2, 0).numpy())
        assert (rgba[..., 3] == 0).mean() > 0.5 * (~valid).float().mean().item() > 0
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not np.isclose(read[a][:, None], read[b]).all((-1, -2)).any()


# Invalid arguments


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range_raises(index):
    with pytest.raises(IndexError, match=rf"index {index}\b.*\b3 clips"):
        World("train", 3)[index]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "valid"}, "split='valid' .*train, val, test"),
        ({"mode": "agnet"}, "mode='agnet' .*'motion'.*'agent'"),
        ({"camera": "orbt"}, "camera='orbt' .*static, orbit"),
        ({"camera": ["orbit", "drone"]}, r"camera=\['orbit', 'drone'\] .*static, orbit"),
        ({"camera": []}, r"camera=\[\] .*static, orbit"),
        ({"size": 0}, r"^size=0\b.*\b1\b"),
        ({"num_frames": 1}, r"num_frames=1\b.*\b2\b"),
        ({"image_size": 7}, r"image_size=7\b.*\b8\b"),
        ({"min_objects": 0}, r"min_objects=0 and max_objects=3\b.*\b1 to 3\b"),
        ({"max_objects": 4}, r"min_objects=1 and max_objects=4\b"),
        ({"min_objects": 3, "max_objects": 2}, r"min_objects=3 and max_objects=2\b"),
        ({"supersample": 0}, r"supersample=0\b.*\b1 to 8\b"),
        ({"supersample": 9}, r"supersample=9\b.*\b1 to 8\b"),
    ],
)
def test_invalid_arguments_raise(options, expected):
    with pytest.raises(ValueError, match=expected) as error:
        World(**options)
    assert "\n" not in str(error.value)
