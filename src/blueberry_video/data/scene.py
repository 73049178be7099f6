"""Scenes of the procedural world: objects, trajectories, agent actions and cameras, without rendering.

The eight motions come in pairs that are *exact* time reversals of each other (left/right, away/towards, cw/ccw), to the
last bit, and a trajectory visits the same set of positions in both classes of a pair. Moving cameras travel
symmetrically about the pose that defines left and away, in either direction with equal probability. One frame, or all
frames without their order, therefore do not distinguish the classes of a pair; only motion does.

World: z up, meters. Cameras: OpenCV (x right, y down, z forward), camera-to-world.
Shapes: T frames, N objects, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

SHAPES = ("sphere", "box", "cylinder")
COLOURS = {
    "red": (0.90, 0.15, 0.12),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SIZES = {"small": 0.22, "large": 0.40}  # meters: radius of the footprint of an object
MOTIONS = {  # class name -> phrase in the caption
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

FOV = 0.6911  # radians, horizontal and vertical
ARENA = 1.2  # object centres stay within |x|, |y| <= ARENA
TRAVEL, CIRCLE, HOP = 1.6, 0.5, 0.6  # meters: length of a straight path, radius of a circle, height of a hop
STEP, STICKY = 0.10, 0.75  # meters per action; probability that the random policy repeats its last action
DISTANCE, ELEVATION = (3.6, 4.4), (np.radians(20.0), np.radians(45.0))
ORBIT, PAN = np.radians(60.0), np.radians(12.0)  # total angle over a clip
TARGET = np.array([0.0, 0.0, 0.3])
HALF_HEIGHT = {"sphere": 1.0, "box": 0.5**0.5, "cylinder": 1.0}  # in radii; a box is a cube inscribed in its footprint


@dataclass(frozen=True)
class Scene:
    """All random values of a clip except the agent's actions. Object 0 is the one that moves.

    `rest` (N, 3) are the centers of the objects in meters; for object 0 the middle of its path, on the floor (agent
    mode: the start). `yaw` (N,) is the rotation about z, `phase` the angle of object 0 on its circle in the middle of
    the clip, both in radians. `azimuth`, `elevation` (radians) and `distance` (meters) define the reference camera;
    `motion` and actions are relative to its view. `sweep` (+1 or -1) is the direction of a moving camera.
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
        """Unit vectors on the floor, (2, 2): row 0 to the right of the reference camera, row 1 away from it."""
        sine, cosine = np.sin(self.azimuth), np.cos(self.azimuth)
        return np.array([[-sine, cosine], [-cosine, -sine]])


def generator(*seed: int) -> np.random.Generator:
    """Returns the random stream of a seed: (split, index) for the scene, longer seeds for everything else in a clip."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def draw_scene(seed: Sequence[int], mode: str, min_objects: int, max_objects: int, cameras: Sequence[str]) -> Scene:
    """Draws the scene of a seed. The camera is drawn last, so that worlds with different `cameras` share scenes."""
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
    reach = 0.8 if mode == "agent" else ARENA - TRAVEL / 2  # a straight path stays in the arena in every direction
    while not _place(scene, rng, reach):
        pass
    return replace(scene, camera=str(rng.choice(list(cameras))))


def _place(scene: Scene, rng: np.random.Generator, reach: float) -> bool:
    """Draws positions that collide neither with each other nor with the path of object 0; False if none is free."""
    scene.rest[0, :2] = rng.uniform(-reach, reach, 2)
    taken = trajectory(scene, 33)[:, 0, :2]
    clearance = np.full(len(taken), scene.radii[0])
    for k in range(1, len(scene.rest)):
        candidates = rng.uniform(-ARENA, ARENA, (64, 2))
        gaps = np.linalg.norm(candidates[:, None] - taken, axis=-1) - clearance - scene.radii[k]
        free = np.flatnonzero(gaps.min(1) > 0.03)
        if not len(free):
            return False
        scene.rest[k, :2] = candidates[free[0]]
        taken, clearance = np.vstack([taken, scene.rest[k, :2]]), np.append(clearance, scene.radii[k])
    return True


def centred_time(num_frames: int) -> np.ndarray:
    """Returns the times of the frames from -1/2 to 1/2, (T,), exactly antisymmetric: reversal is negation."""
    return (2 * np.arange(num_frames) - (num_frames - 1)) / (2 * (num_frames - 1))


def trajectory(scene: Scene, num_frames: int) -> np.ndarray:
    """Returns the centers of the objects in every frame, (T, N, 3) in meters."""
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
    """Returns the position (2,) in meters of object 0 after an action (an index into ACTIONS) at `position` (2,).

    The object moves by STEP to the left, right, away or towards in the view of the reference camera, is clamped to the
    arena, and does not move if it would collide with another object.

    Raises:
        ValueError: an unknown action.
    """
    if action not in range(len(ACTIONS)):
        raise ValueError(f"action={action!r} must be 0 to {len(ACTIONS) - 1}, an index of {', '.join(ACTIONS)}.")
    right, away = scene.axes
    way = (np.zeros(2), -right, right, away, -away)[action]
    wanted = np.clip(position + STEP * way, -ARENA, ARENA)
    gaps = np.linalg.norm(scene.rest[1:, :2] - wanted, axis=1) - scene.radii[1:] - scene.radii[0]
    return position if (gaps < 0).any() else wanted


def random_actions(scene: Scene, count: int) -> list[int]:
    """Returns the actions of a sticky random policy: repeats the last with probability STICKY, otherwise uniform."""
    rng = generator(*scene.seed, 1)
    actions: list[int] = []
    for _ in range(count):
        repeat = actions and rng.random() < STICKY
        actions.append(actions[-1] if repeat else int(rng.integers(len(ACTIONS))))
    return actions


def camera_poses(scene: Scene, num_frames: int) -> np.ndarray:
    """Returns the OpenCV camera-to-world matrices, (V, T, 4, 4); V is 4 for rig4, otherwise 1."""
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
    """Draws independent poses over the whole range of directions and distances, (count, 4, 4)."""
    rng = generator(*seed)
    return look_at(rng.uniform(0, 2 * np.pi, count), rng.uniform(*ELEVATION, count), rng.uniform(*DISTANCE, count))


def look_at(azimuth: ArrayLike, elevation: ArrayLike, distance: ArrayLike, turn: ArrayLike = 0.0) -> np.ndarray:
    """Returns poses (..., 4, 4) of cameras around TARGET that look at it and are then rotated by `turn` radians."""
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
    """Returns the pinhole camera matrix (3, 3) in pixels."""
    focal = 0.5 * image_size / np.tan(FOV / 2)
    return np.array([[focal, 0, image_size / 2], [0, focal, image_size / 2], [0, 0, 1]], np.float32)


@dataclass(frozen=True)
class State:
    """State of the agent's world: the scene and the `position` (2,) of object 0 on the floor in meters."""

    scene: Scene
    position: np.ndarray

    @property
    def vector(self) -> np.ndarray:
        """Position of object 0 in the camera's directions: meters (right, away) from the center of the arena, (2,)."""
        return self.scene.axes @ self.position

    @property
    def centres(self) -> np.ndarray:
        """Centers of the objects, (N, 3) in meters."""
        centres = self.scene.rest.copy()
        centres[0, :2] = self.position
        return centres


def caption(scene: Scene, mode: str = "motion") -> str:
    """Returns a sentence about object 0 and the camera; the vocabulary has at most 40 words."""
    phrase = "follows commands" if mode == "agent" else MOTIONS[scene.motion]
    subject = f"a {scene.sizes[0]} {scene.colours[0]} {scene.shapes[0]}"
    return f"{subject} {phrase} on a checkered floor while {CAMERAS[scene.camera]}"
