"""The procedural 3-D world: small ray-cast clips with ground truth for every family (labels, depth, poses, actions).

One to three spheres, boxes and cylinders stand on a checkered floor under one light; object 0 moves, or obeys commands,
and a camera watches. Clip i is a pure function of (split, i): numpy's PCG64 seeded with SeedSequence([split, i]), and the
scene it draws depends on neither the image size nor the number of frames, so a preset only changes the resolution.

What is unusual: the eight motions come in pairs that are *exactly* each other played backwards (left/right,
away/towards, cw/ccw), to the last bit, and each path's set of positions is the same for both classes of a pair. Moving
cameras travel symmetrically about the pose that defines left and away, in either direction with equal chance. So one
frame, or all frames without their order, says nothing about which class of a pair it is; only motion does.

World: z up, metres. Cameras: OpenCV (x right, y down, z forward), camera-to-world, pixel centres at +0.5.
Letters: T frames, N objects, V views, H = W image side, n rays; arrays of points are (3, n), one row a coordinate.
"""

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")
SHAPES = ("sphere", "box", "cylinder")
COLOURS = {
    "red": (0.90, 0.15, 0.12),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SIZES = {"small": 0.22, "large": 0.40}  # metres: the radius of the disc an object occupies on the floor
MOTIONS = {  # class name -> what the caption says
    "still": "stays still",
    "left": "moves left",
    "right": "moves right",
    "away": "moves away",
    "towards": "moves towards the camera",
    "hop": "hops",
    "cw": "circles clockwise",
    "ccw": "circles counterclockwise",
}
CAMERAS = {
    "static": "the camera stays still",
    "orbit": "the camera orbits",
    "pan": "the camera pans",
    "dolly": "the camera dollies",
    "dnerf": "the camera jumps",
    "rig4": "four cameras watch",
}
ACTIONS = ("noop", "left", "right", "away", "towards")
SKY, FLOOR, FIRST_OBJECT = 0, 1, 2  # values of `seg`; object k is FIRST_OBJECT + k

FPS = 8.0
FOV = 0.6911  # radians, horizontal and vertical
ARENA = 1.2  # object centres stay within |x|, |y| <= ARENA
TRAVEL, CIRCLE, HOP = 1.6, 0.5, 0.6  # metres: way of a straight motion, radius of a turn, height of a hop
STEP, STICKY = 0.10, 0.75  # metres an action moves; chance that the random policy repeats its last action
DISTANCE, ELEVATION = (3.6, 4.4), (np.radians(20.0), np.radians(45.0))
ORBIT, PAN = np.radians(60.0), np.radians(12.0)  # whole angle swept during a clip
TARGET = np.array([0.0, 0.0, 0.3])
FLOOR_EXTENT, FLOOR_TILE, FLOOR_GREYS = 4.0, 0.5, (0.50, 0.85)
LIGHT = np.array([0.4, -0.5, 0.77], np.float32) / np.float32(np.linalg.norm([0.4, -0.5, 0.77]))
AMBIENT, SHADOW = 0.35, 0.35  # share of light from everywhere; what a hard shadow leaves of the direct rest
HALF_HEIGHT = {"sphere": 1.0, "box": 0.5**0.5, "cylinder": 1.0}  # in radii; a box is a cube inscribed in its disc
BOUND = {"sphere": 1.0, "box": 1.5**0.5, "cylinder": 2**0.5}  # radius of the bounding sphere, in radii
DARK_PATCH = 0.70  # the darker squares of an object's own checker
RAYS_PER_CHUNK = 1 << 16  # frames are traced together up to this many rays, so that the arrays stay in cache


@dataclass(frozen=True)
class Scene:
    """Everything random about a clip except the agent's actions; object 0 is the one that moves.

    `rest` (N, 3) are the objects' centres where object 0 is halfway on its path (agent mode: at the start) and `yaw` (N,)
    their turn about z; `azimuth`, `elevation` (radians) and `distance` (metres) place the reference camera, in whose
    view `motion` and actions are meant; `sweep` (+1 or -1) is the direction in which a moving camera travels.
    """

    seed: tuple[int, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    yaw: np.ndarray
    rest: np.ndarray
    motion: str
    phase: float
    azimuth: float
    elevation: float
    distance: float
    sweep: int
    camera: str

    @property
    def radii(self) -> np.ndarray:
        return np.array([SIZES[size] for size in self.sizes])

    @property
    def axes(self) -> np.ndarray:
        """Rows: unit vectors on the floor to the right of the reference camera, and away from it, (2, 2)."""
        sine, cosine = np.sin(self.azimuth), np.cos(self.azimuth)
        return np.array([[-sine, cosine], [-cosine, -sine]])


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def draw_scene(seed: Sequence[int], mode: str, min_objects: int, max_objects: int, cameras: Sequence[str]) -> Scene:
    """The scene of a seed. The camera kind is drawn last: worlds that differ only in `cameras` share their scenes."""
    rng = generator(*seed)
    count = int(rng.integers(min_objects, max_objects + 1))
    shapes, colours, sizes = (
        tuple(str(name) for name in rng.choice(list(names), count)) for names in (SHAPES, COLOURS, SIZES)
    )
    motion = str(rng.choice(list(MOTIONS)))
    scene = Scene(
        seed=tuple(seed),
        shapes=shapes,
        colours=colours,
        sizes=sizes,
        yaw=rng.uniform(0, 2 * np.pi, count),
        rest=np.array([[0, 0, SIZES[size] * HALF_HEIGHT[shape]] for shape, size in zip(shapes, sizes)]),
        motion="still" if mode == "agent" else motion,
        phase=float(rng.uniform(0, 2 * np.pi)),
        azimuth=float(rng.uniform(0, 2 * np.pi)),
        elevation=float(rng.uniform(*ELEVATION)),
        distance=float(rng.uniform(*DISTANCE)),
        sweep=int(rng.choice([-1, 1])),
        camera="static",
    )
    reach = 0.8 if mode == "agent" else ARENA - TRAVEL / 2  # a straight path fits the arena in every direction
    while not _place(scene, rng, reach):
        pass
    return replace(scene, camera=str(rng.choice(list(cameras))))


def _place(scene: Scene, rng: np.random.Generator, reach: float) -> bool:
    """Puts the objects on the floor, the others clear of each other and of object 0's whole path; False if stuck."""
    scene.rest[0, :2] = rng.uniform(-reach, reach, 2)
    taken = trajectory(scene, 33)[:, 0, :2]
    clearance = np.full(len(taken), scene.radii[0])
    for k in range(1, len(scene.rest)):
        spots = rng.uniform(-ARENA, ARENA, (64, 2))
        gaps = np.linalg.norm(spots[:, None] - taken, axis=-1) - clearance - scene.radii[k]
        free = np.flatnonzero(gaps.min(1) > 0.03)
        if not len(free):
            return False
        scene.rest[k, :2] = spots[free[0]]
        taken, clearance = np.vstack([taken, scene.rest[k, :2]]), np.append(clearance, scene.radii[k])
    return True


def centred_time(num_frames: int) -> np.ndarray:
    """Times of the frames from -1/2 to 1/2, (T,), antisymmetric to the last bit: reversal is exact negation."""
    return (2 * np.arange(num_frames) - (num_frames - 1)) / (2 * (num_frames - 1))


def trajectory(scene: Scene, num_frames: int) -> np.ndarray:
    """Centres of the objects in every frame under the scene's motion, (T, N, 3) metres."""
    time, (right, away) = centred_time(num_frames)[:, None], scene.axes
    centres = np.repeat(scene.rest[None], num_frames, axis=0)
    ways = {"left": -right, "right": right, "away": away, "towards": -away}
    if scene.motion in ways:
        centres[:, 0, :2] += TRAVEL * ways[scene.motion] * time
    elif scene.motion in ("cw", "ccw"):  # as seen from above, where every camera is
        angle = scene.phase + (2 if scene.motion == "ccw" else -2) * np.pi * time
        centres[:, 0, :2] += CIRCLE * np.hstack([np.cos(angle), np.sin(angle)])
    elif scene.motion == "hop":
        centres[:, 0, 2] += HOP * np.abs(np.sin(2 * np.pi * time[:, 0]))
    return centres


def push(scene: Scene, position: np.ndarray, action: int) -> np.ndarray:
    """Where object 0 at `position` (2,) stands after an action (an index into ACTIONS), as floor metres (2,).

    It moves STEP to the left, right, away or towards as the reference camera sees it, is clamped to the arena, and does
    not move at all where it would run into another object. Raises ValueError on an unknown action.
    """
    if action not in range(len(ACTIONS)):
        raise ValueError(
            f"action {action!r} is not known: use an index into ACTIONS, 0 to {len(ACTIONS) - 1} {ACTIONS}."
        )
    right, away = scene.axes
    way = (np.zeros(2), -right, right, away, -away)[action]
    wanted = np.clip(position + STEP * way, -ARENA, ARENA)
    gaps = np.linalg.norm(scene.rest[1:, :2] - wanted, axis=1) - scene.radii[1:] - scene.radii[0]
    return position if (gaps < 0).any() else wanted


def random_actions(scene: Scene, count: int) -> list[int]:
    """Actions of the sticky random policy for a scene: each repeats the last with chance STICKY, else is uniform."""
    rng = generator(*scene.seed, 1)
    actions: list[int] = []
    for _ in range(count):
        repeat = actions and rng.random() < STICKY
        actions.append(actions[-1] if repeat else int(rng.integers(len(ACTIONS))))
    return actions


def camera_poses(scene: Scene, num_frames: int) -> np.ndarray:
    """OpenCV camera-to-world matrices of every view and frame, (V, T, 4, 4); V is 4 for rig4, else 1."""
    time = scene.sweep * centred_time(num_frames)
    if scene.camera == "dnerf":
        poses = random_poses((*scene.seed, 2), num_frames)
        poses[0] = look_at(scene.azimuth, scene.elevation, scene.distance)
        return poses[None]
    views = np.arange(4)[:, None] * np.pi / 2 if scene.camera == "rig4" else np.zeros((1, 1))
    azimuth = scene.azimuth + views + (ORBIT * time if scene.camera == "orbit" else 0 * time)
    mid, reach = sum(DISTANCE) / 2, DISTANCE[1] - DISTANCE[0]
    distance = mid + reach * time if scene.camera == "dolly" else scene.distance
    return look_at(azimuth, scene.elevation, distance, PAN * time if scene.camera == "pan" else 0.0)


def random_poses(seed: Sequence[int], count: int) -> np.ndarray:
    """Independent poses over the whole range of directions and distances, (count, 4, 4)."""
    rng = generator(*seed)
    return look_at(rng.uniform(0, 2 * np.pi, count), rng.uniform(*ELEVATION, count), rng.uniform(*DISTANCE, count))


def look_at(azimuth: Any, elevation: Any, distance: Any, turn: Any = 0.0) -> np.ndarray:
    """Camera-to-world (..., 4, 4) of cameras around TARGET, looking at it and then turned aside by `turn` radians."""
    azimuth, elevation, distance, turn = np.broadcast_arrays(azimuth, elevation, distance, turn)

    def outward(angle: np.ndarray) -> np.ndarray:
        level = np.cos(elevation)
        return np.stack([level * np.cos(angle), level * np.sin(angle), np.sin(elevation)], axis=-1)

    heading = azimuth + turn
    right = np.stack([-np.sin(heading), np.cos(heading), np.zeros_like(heading)], axis=-1)
    forward = -outward(heading)
    poses = np.zeros((*azimuth.shape, 4, 4))
    poses[..., :3, 0], poses[..., :3, 1], poses[..., :3, 2] = right, np.cross(forward, right), forward
    poses[..., :3, 3], poses[..., 3, 3] = TARGET + distance[..., None] * outward(azimuth), 1.0
    return poses


def intrinsics(image_size: int) -> np.ndarray:
    """Pinhole matrix (3, 3) in pixels."""
    focal = 0.5 * image_size / np.tan(FOV / 2)
    return np.array([[focal, 0, image_size / 2], [0, focal, image_size / 2], [0, 0, 1]], np.float32)


def render(
    scene: Scene, centres: np.ndarray, poses: np.ndarray, image_size: int, supersample: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of the objects at `centres` (T, N, 3) from `poses` (T, 4, 4).

    Returns video (T, 3, H, W) uint8, the mean of supersample² rays a pixel; depth (T, H, W) float32, metres along the
    optical axis at the pixel's centre, 0 for sky; seg (T, H, W) uint8, likewise at the centre: SKY, FLOOR,
    FIRST_OBJECT + k.
    """
    fine = image_size * supersample
    chunk = max(1, RAYS_PER_CHUNK // fine**2)
    video, depth, seg = [], [], []
    for start in range(0, len(poses), chunk):
        part = slice(start, start + chunk)
        caster = _RayCaster(scene, centres[part], poses[part], fine)
        video.append(_average(caster.shade().reshape(-1, fine, fine, 3), supersample))
        if supersample > 1:
            caster = _RayCaster(scene, centres[part], poses[part], image_size)
        depth.append(np.where(caster.seg == SKY, np.float32(0), caster.depth).reshape(-1, image_size, image_size))
        seg.append(caster.seg.reshape(-1, image_size, image_size))
    return np.ascontiguousarray(np.concatenate(video).transpose(0, 3, 1, 2)), np.concatenate(depth), np.concatenate(seg)


def _average(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean of factor x factor blocks of (T, H, W, 3) uint8, rounded."""
    if factor == 1:
        return image
    total = np.full((len(image), image.shape[1] // factor, image.shape[2] // factor, 3), factor**2 // 2, np.uint16)
    for row in range(factor):
        for column in range(factor):
            total += image[:, row::factor, column::factor]
    return (total // factor**2).astype(np.uint8)


class _RayCaster:
    """All rays of a few frames, flat (n = T·H·W): what each meets first (`seg`), how deep (`depth`), and its colour."""

    def __init__(self, scene: Scene, centres: np.ndarray, poses: np.ndarray, size: int) -> None:
        self.scene, self.size = scene, size
        self.centres = centres.astype(np.float32).transpose(1, 2, 0)  # (N, 3, T)
        self.eye = poses[:, :3, 3].T.astype(np.float32)  # (3, T)
        self.turn = poses[:, :3, :3].transpose(1, 0, 2).astype(np.float32)  # (3 world, T, 3 camera)
        self.slopes = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32) * np.float32(np.tan(FOV / 2))
        self.yaw = np.stack([np.cos(scene.yaw), np.sin(scene.yaw)], axis=1).astype(np.float32)
        # Camera z of every direction is 1, so that the ray parameter is the z-depth.
        across = self.turn[..., 0, None] * self.slopes + self.turn[..., 2, None]
        down = self.turn[..., 1, None] * self.slopes
        rays = across[:, :, None, :] + down[..., None]  # (3, T, H, W)
        self.frame = np.repeat(np.arange(len(poses)), size**2)
        self.rays = rays.reshape(3, -1)
        self._meet_floor()
        for k in range(len(scene.shapes)):
            self._meet_object(k)

    def _meet_floor(self) -> None:
        size = self.size**2
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            depth = np.repeat(-self.eye[2], size) / self.rays[2]
            x = np.repeat(self.eye[0], size) + depth * self.rays[0]
            y = np.repeat(self.eye[1], size) + depth * self.rays[1]
            seen = (depth > 0) & (np.maximum(np.abs(x), np.abs(y)) < FLOOR_EXTENT)
        self.depth = np.where(seen, depth, np.float32(np.inf))
        self.seg = seen.astype(np.uint8)  # SKY or FLOOR

    def _meet_object(self, k: int) -> None:
        index = self._rays_near(k)
        frame = self.frame[index]
        origin = self._to_local(k, self.eye - self.centres[k])[:, frame]
        near = _entry(self.scene.shapes[k], self.scene.radii[k], origin, self._to_local(k, self.rays[:, index]))
        hit = near < self.depth[index]
        self.depth[index[hit]] = near[hit]
        self.seg[index[hit]] = FIRST_OBJECT + k

    def _rays_near(self, k: int) -> np.ndarray:
        """Indices of the rays within the screen rectangle around object k's bounding sphere."""
        bound = np.float32(self.scene.radii[k] * BOUND[self.scene.shapes[k]])
        x, y, z = np.einsum("wtc,wt->ct", self.turn, self.centres[k] - self.eye)
        inside = []
        for side in (y, x):
            half = bound * np.sqrt(side**2 + z**2 - bound**2)
            low, high = (side * z - half) / (z**2 - bound**2), (side * z + half) / (z**2 - bound**2)
            inside.append((self.slopes >= low[:, None]) & (self.slopes <= high[:, None]))
        return np.flatnonzero(inside[0][:, :, None] & inside[1][:, None, :])

    def _to_local(self, k: int, vector: np.ndarray) -> np.ndarray:
        cosine, sine = self.yaw[k]
        x, y, z = vector
        return np.stack([cosine * x + sine * y, cosine * y - sine * x, z])

    def shade(self) -> np.ndarray:
        """Colour of every ray, (n, 3) uint8."""
        image = np.full((len(self.seg), 3), 255, np.uint8)
        for surface in range(FLOOR, FIRST_OBJECT + len(self.scene.shapes)):
            index = np.flatnonzero(self.seg == surface)
            if not len(index):
                continue
            frame = self.frame[index]
            points = self.eye[:, frame] + self.depth[index] * self.rays[:, index]
            if surface == FLOOR:
                tiles = np.floor(points[:2] / np.float32(FLOOR_TILE)).astype(np.int32).sum(0) & 1
                albedo = np.repeat(np.array(FLOOR_GREYS, np.float32)[:, None], 3, axis=1)[tiles]
                facing = np.full(len(index), LIGHT[2])
            else:
                k = surface - FIRST_OBJECT
                local = self._to_local(k, points - self.centres[k][:, frame])
                facing = self._facing(k, local)
                patches = (
                    np.floor(local / np.float32(self.scene.radii[k] / 2) + np.float32(0.5)).astype(np.int32).sum(0)
                )
                shades = np.array([1, DARK_PATCH], np.float32)[:, None]
                albedo = (shades * np.array(COLOURS[self.scene.colours[k]], np.float32))[patches & 1]
            facing[self._in_shadow(surface - FIRST_OBJECT, points, frame)] *= np.float32(SHADOW)
            light = np.float32(AMBIENT) + np.float32(1 - AMBIENT) * facing
            image[index] = (albedo * light[:, None] * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        return image

    def _facing(self, k: int, local: np.ndarray) -> np.ndarray:
        """Cosine between light and the surface normal of object k at points in its own frame, at least 0, (n,)."""
        shape, radius = self.scene.shapes[k], np.float32(self.scene.radii[k])
        light = self._to_local(k, LIGHT)
        if shape == "sphere":
            normal = local / radius
        elif shape == "box":
            normal = np.sign(local) * (np.abs(local) >= np.abs(local).max(0))
        else:
            cap = np.abs(local[2]) > np.hypot(local[0], local[1])  # radius and half height are equal
            normal = np.stack([local[0] / radius, local[1] / radius, np.zeros_like(local[2])]) * ~cap
            normal[2] = np.sign(local[2]) * cap
        return np.maximum(light @ normal, np.float32(0))

    def _in_shadow(self, own: int, points: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Whether another object stands between points and the light, (n,) bool. A convex object never shades itself."""
        shadow = np.zeros(len(frame), bool)
        for k, shape in enumerate(self.scene.shapes):
            if k == own:
                continue
            bound = self.scene.radii[k] * BOUND[shape]
            x, y, z = offset = points - self.centres[k][:, frame]
            along = LIGHT[0] * x + LIGHT[1] * y + LIGHT[2] * z
            index = np.flatnonzero((x * x + y * y + z * z - along * along < bound**2) & (along < bound))
            light = np.repeat(self._to_local(k, LIGHT)[:, None], len(index), axis=1)
            near = _entry(shape, self.scene.radii[k], self._to_local(k, offset[:, index]), light)
            shadow[index[np.isfinite(near)]] = True
        return shadow


def _entry(shape: str, radius: float, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Ray parameter (n,) at which rays (3, n), in the object's own frame, enter it; inf where they miss it.

    Every shape is an intersection of round and flat intervals: a sphere one ball, a cylinder a tube and a slab, a box
    three slabs.
    """
    round_axes, flat_axes = {"sphere": ([0, 1, 2], []), "cylinder": ([0, 1], [2]), "box": ([], [0, 1, 2])}[shape]
    half = np.float32(radius * HALF_HEIGHT[shape])
    spans = [_slab(origin[axis], direction[axis], half) for axis in flat_axes]
    if round_axes:
        spans.append(_ball(origin[round_axes], direction[round_axes], np.float32(radius)))
    near, far = spans[0]
    for start, end in spans[1:]:
        near, far = np.maximum(near, start), np.minimum(far, end)
    return np.where((near < far) & (far > 0), near, np.float32(np.inf))


def _ball(origin: np.ndarray, direction: np.ndarray, radius: np.float32) -> tuple[np.ndarray, np.ndarray]:
    square = (direction * direction).sum(0)
    middle = -(origin * direction).sum(0) / square
    closest = origin + middle * direction  # squared here, not b² - 4ac: float32 would lose the rim
    half = np.sqrt(np.maximum((radius * radius - (closest * closest).sum(0)) / square, 0))
    return middle - half, middle + half  # empty (near = far) where the ray misses


def _slab(origin: np.ndarray, direction: np.ndarray, half: np.float32) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-half - origin) / direction, (half - origin) / direction
    return np.minimum(one, other), np.maximum(one, other)


@dataclass(frozen=True)
class State:
    """A moment of the agent's world: the scene, and where object 0 stands, `position` (2,) floor metres."""

    scene: Scene
    position: np.ndarray

    @property
    def vector(self) -> np.ndarray:
        """Object 0 as the agent sees it, metres (right, away) of the arena's centre, (2,): an action adds STEP to one."""
        return self.scene.axes @ self.position

    @property
    def centres(self) -> np.ndarray:
        """(N, 3) metres."""
        centres = self.scene.rest.copy()
        centres[0, :2] = self.position
        return centres


class Simulator:
    """The agent's world one step at a time, under a static camera, for closed-loop planning.

    `reset((split, index))` starts where clip `index` of `World(mode="agent", camera="static")` of that split (0, 1, 2)
    and of these object counts starts; the clip's actions then replay the clip. Assign `state` to rewind, or call
    `push` to look ahead without moving.
    """

    def __init__(self, image_size: int = 64, min_objects: int = 1, max_objects: int = 3, supersample: int = 2) -> None:
        _check(image_size=image_size, min_objects=min_objects, max_objects=max_objects, supersample=supersample)
        self.image_size, self.supersample = image_size, supersample
        self.min_objects, self.max_objects = min_objects, max_objects
        self.state: State | None = None

    def reset(self, seed: int | Sequence[int]) -> State:
        seed = (seed,) if isinstance(seed, int) else tuple(seed)
        scene = draw_scene(seed, "agent", self.min_objects, self.max_objects, ["static"])
        self.state = State(scene, scene.rest[0, :2])
        return self.state

    def step(self, action: int) -> State:
        """Carries out an action (an index into ACTIONS). Raises RuntimeError before the first reset, ValueError on an
        unknown action."""
        if self.state is None:
            raise RuntimeError("the simulator has no scene yet: call reset(seed) before step(action).")
        self.state = replace(self.state, position=push(self.state.scene, self.state.position, action))
        return self.state

    def render(self, state: State) -> Tensor:
        """The picture of a state, (3, H, W) uint8."""
        pose = camera_poses(state.scene, 2)[0, :1]
        video, _, _ = render(state.scene, state.centres[None], pose, self.image_size, self.supersample)
        return torch.from_numpy(video[0])


class World(Dataset):
    """Map-style dataset of clips (`docs/architecture.md`, Clip) of the procedural world.

    Args:
        split: "train", "val" or "test", or any integer >= 0 (the names are 0, 1, 2); splits never share a seed.
        size: number of clips.
        num_frames: T, at least 2; at 8 frames/s.
        image_size: H = W in pixels.
        min_objects, max_objects: 1 to 3; every clip draws its number of objects between them.
        camera: static, orbit, pan, dolly, dnerf (a random pose each frame) or rig4 (four static cameras, a quarter turn
            apart), or a list of these from which each clip draws.
        mode: "motion" (object 0 makes one of eight motions) or "agent" (it obeys a sticky random policy's actions).
        supersample: rays per pixel are supersample²; depth and seg always belong to the pixel's centre.

    `classes["motion"]` exists in motion mode only. `reversal_pairs` lists the motions that are each other played
    backwards; "still" and "hop" are their own reversal and so are in no pair. Reversal holds for every camera but dnerf,
    whose poses have no order.

    Raises ValueError on an argument out of range.
    """

    def __init__(
        self,
        split: int | str = "train",
        size: int = 10_000,
        num_frames: int = 16,
        image_size: int = 64,
        min_objects: int = 1,
        max_objects: int = 3,
        camera: str | Sequence[str] = "static",
        mode: Literal["motion", "agent"] = "motion",
        supersample: int = 2,
    ) -> None:
        if isinstance(split, str) and split not in SPLITS or isinstance(split, int) and split < 0:
            raise ValueError(f"split is {split!r}: use one of {SPLITS}, or an integer of at least 0.")
        if mode not in ("motion", "agent"):
            raise ValueError(f"mode is {mode!r}: use 'motion' or 'agent'.")
        cameras = [camera] if isinstance(camera, str) else list(camera)
        if not cameras or not set(cameras) <= set(CAMERAS):
            raise ValueError(f"camera is {camera!r}: use one of {list(CAMERAS)}, or a list of some of them.")
        _check(image_size=image_size, min_objects=min_objects, max_objects=max_objects, supersample=supersample)
        if size < 1:
            raise ValueError(f"size is {size}: a world needs at least 1 clip.")
        if num_frames < 2:
            raise ValueError(f"num_frames is {num_frames}: motion needs at least 2 frames.")
        self.split = SPLITS.index(split) if isinstance(split, str) else split
        self.size, self.num_frames, self.image_size, self.supersample = size, num_frames, image_size, supersample
        self.min_objects, self.max_objects, self.cameras, self.mode = min_objects, max_objects, cameras, mode
        self.classes: dict[str, tuple[str, ...]] = {
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "size": tuple(SIZES),
            "motion": tuple(MOTIONS),
            "camera": tuple(CAMERAS),
        }
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {"motion": ((1, 2), (3, 4), (6, 7))}
        if mode == "agent":
            del self.classes["motion"], self.reversal_pairs["motion"]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index` through the first camera. Agent mode adds `actions` (T-1,) int64 and `states` (T, 2) float32,
        metres right and away of the arena's centre as the reference camera sees it."""
        scene, centres, agent = self._play(index)
        poses = camera_poses(scene, self.num_frames)[0]
        video, depth, seg = render(scene, centres, poses, self.image_size, self.supersample)
        return {
            "id": f"{self.split}-{index:06d}",
            "video": torch.from_numpy(video),
            "depth": torch.from_numpy(depth),
            "seg": torch.from_numpy(seg),
            "intrinsics": torch.from_numpy(intrinsics(self.image_size)),
            "poses": torch.from_numpy(poses.astype(np.float32)),
            "fps": FPS,
            "labels": self._labels(scene),
            "caption": caption(scene, self.mode),
            **agent,
        }

    def scene(self, index: int) -> Scene:
        """What clip `index` shows. Raises IndexError outside 0 to size - 1."""
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} does not exist: this world has {self.size} clips, 0 to {self.size - 1}.")
        return draw_scene((self.split, index), self.mode, self.min_objects, self.max_objects, self.cameras)

    def sample(self, index: int) -> dict[str, Any]:
        """Clip `index` through every camera (V views), with the whole ground truth.

        video (V, T, 3, H, W) uint8; depth (V, T, H, W) float32; valid, likewise bool, depth > 0; seg (V, T, H, W) uint8;
        K (V, 3, 3) and c2w (V, T, 4, 4) float32; time (T,) float32 from 0 to 1; labels; caption; `objects`, a dict of
        shape, colour, size (names), yaw (N,) radians and centres (T, N, 3) metres; agent mode: actions, states.
        """
        scene, centres, agent = self._play(index)
        poses = camera_poses(scene, self.num_frames)
        views = [render(scene, centres, view, self.image_size, self.supersample) for view in poses]
        video, depth, seg = (torch.from_numpy(np.stack(kind)) for kind in zip(*views))
        return {
            "id": f"{self.split}-{index:06d}",
            "video": video,
            "depth": depth,
            "valid": depth > 0,
            "seg": seg,
            "K": torch.from_numpy(intrinsics(self.image_size)).repeat(len(poses), 1, 1),
            "c2w": torch.from_numpy(poses.astype(np.float32)),
            "time": torch.linspace(0, 1, self.num_frames),
            "fps": FPS,
            "labels": self._labels(scene),
            "caption": caption(scene, self.mode),
            "objects": {
                "shape": scene.shapes,
                "colour": scene.colours,
                "size": scene.sizes,
                "yaw": torch.from_numpy(scene.yaw.astype(np.float32)),
                "centres": torch.from_numpy(centres.astype(np.float32)),
            },
            **agent,
        }

    def _labels(self, scene: Scene) -> dict[str, int]:
        shown = {
            "shape": scene.shapes[0],
            "colour": scene.colours[0],
            "size": scene.sizes[0],
            "motion": scene.motion,
            "camera": scene.camera,
        }
        return {label: names.index(shown[label]) for label, names in self.classes.items()}

    def _play(self, index: int) -> tuple[Scene, np.ndarray, dict[str, Tensor]]:
        """The scene, its objects' centres (T, N, 3), and in agent mode the actions and states."""
        scene = self.scene(index)
        if self.mode == "motion":
            return scene, trajectory(scene, self.num_frames), {}
        actions = random_actions(scene, self.num_frames - 1)
        states = [State(scene, scene.rest[0, :2])]
        for action in actions:
            states.append(State(scene, push(scene, states[-1].position, action)))
        vectors = np.stack([state.vector for state in states]).astype(np.float32)
        agent = {"actions": torch.tensor(actions), "states": torch.from_numpy(vectors)}
        return scene, np.stack([state.centres for state in states]), agent

    def export_dnerf(self, index: int, folder: str | Path) -> None:
        """Writes clip `index` as a D-NeRF scene (Pumarola et al. 2021; read by 4D-GS): transforms_{train,val,test}.json
        and RGBA pictures, transparent where only sky is seen, so that compositing over white gives back the clip.

        train holds every view and frame of the clip; val and test the same moments from random held-out poses.
        """
        scene, centres, _ = self._play(index)
        held_out = [random_poses((*scene.seed, stream), self.num_frames)[None] for stream in (3, 4)]
        for split, poses in zip(SPLITS, [camera_poses(scene, self.num_frames), *held_out]):
            pictures = Path(folder) / split
            pictures.mkdir(parents=True, exist_ok=True)
            frames = []
            for view in poses:
                video, depth, _ = render(scene, centres, view, self.image_size, self.supersample)
                opaque = (depth > 0) | (video < 255).any(1)  # a half-covered edge pixel may have its centre in the sky
                rgba = np.concatenate([video, np.uint8(255) * opaque[:, None]], axis=1).transpose(0, 2, 3, 1)
                for t, (picture, pose) in enumerate(zip(rgba, view)):
                    name = f"r_{len(frames):03d}"
                    Image.fromarray(np.ascontiguousarray(picture)).save(pictures / f"{name}.png")
                    opengl = pose * [1, -1, -1, 1]  # y and z of the camera point up and backwards
                    frames.append(
                        {
                            "file_path": f"./{split}/{name}",
                            "time": t / (self.num_frames - 1),
                            "transform_matrix": opengl.tolist(),
                        }
                    )
            text = json.dumps({"camera_angle_x": FOV, "frames": frames}, indent=1)
            (Path(folder) / f"transforms_{split}.json").write_text(text)


def caption(scene: Scene, mode: str = "motion") -> str:
    """One sentence about object 0 and the camera, from a vocabulary of fewer than 40 words."""
    deed = "follows commands" if mode == "agent" else MOTIONS[scene.motion]
    subject = f"a {scene.sizes[0]} {scene.colours[0]} {scene.shapes[0]}"
    return f"{subject} {deed} on a checkered floor while {CAMERAS[scene.camera]}"


def _check(image_size: int, min_objects: int, max_objects: int, supersample: int) -> None:
    if image_size < 8:
        raise ValueError(f"image_size is {image_size}: use at least 8 pixels.")
    if not 1 <= min_objects <= max_objects <= 3:
        raise ValueError(
            f"min_objects is {min_objects} and max_objects is {max_objects}: use 1 <= min_objects <= max_objects <= 3."
        )
    if not 1 <= supersample <= 8:
        raise ValueError(f"supersample is {supersample}: use 1 to 8 rays along each side of a pixel.")
