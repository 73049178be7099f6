"""Ray caster of the procedural world: renders colour, depth and segmentation of all frames at once in numpy.

Every ray is intersected with the floor and, within the screen rectangle around its bounding sphere, with each object.
Hits are lit by one distant light with hard shadows. All frames of a clip share the arrays; the only loops are over
objects.

Shapes: T frames, N objects, H = W image side, n = T·H·W rays; arrays of points are (3, n), one row per coordinate.
"""

import numpy as np

from blueberry_video.data.scene import COLOURS, FOV, HALF_HEIGHT, Scene

SKY, FLOOR, FIRST_OBJECT = 0, 1, 2  # values of `seg`; object k is FIRST_OBJECT + k

FLOOR_EXTENT, FLOOR_TILE, FLOOR_GREYS = 4.0, 0.5, (0.50, 0.85)
LIGHT = np.array([0.4, -0.5, 0.77], np.float32) / np.float32(np.linalg.norm([0.4, -0.5, 0.77]))
AMBIENT, SHADOW = 0.35, 0.35  # fraction of ambient light; factor on the direct light in a shadow
BOUND = {"sphere": 1.0, "box": 1.5**0.5, "cylinder": 2**0.5}  # radius of the bounding sphere, in radii
DARK_PATCH = 0.70  # brightness of the dark squares of an object's checker pattern
RAYS_PER_CHUNK = 1 << 16  # maximum number of rays traced together, so that the arrays stay in cache


def render(
    scene: Scene, centres: np.ndarray, poses: np.ndarray, image_size: int, supersample: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Renders the objects with `centres` (T, N, 3) from camera `poses` (T, 4, 4).

    Returns:
        video (T, 3, H, W) uint8, the mean of supersample² rays per pixel; depth (T, H, W) float32, meters along the
        optical axis at the center of the pixel, 0 for sky; seg (T, H, W) uint8 at the center of the pixel: SKY, FLOOR,
        or FIRST_OBJECT + k.
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
    """Returns the rounded mean over factor x factor blocks of (T, H, W, 3) uint8."""
    if factor == 1:
        return image
    total = np.full((len(image), image.shape[1] // factor, image.shape[2] // factor, 3), factor**2 // 2, np.uint16)
    for row in range(factor):
        for column in range(factor):
            total += image[:, row::factor, column::factor]
    return (total // factor**2).astype(np.uint8)


class _RayCaster:
    """Rays of a few frames, flattened (n = T·H·W), with the first hit (`seg`), its depth and its colour."""

    def __init__(self, scene: Scene, centres: np.ndarray, poses: np.ndarray, size: int) -> None:
        self.scene, self.size = scene, size
        self.centres = centres.astype(np.float32).transpose(1, 2, 0)  # (N, 3, T)
        self.eye = poses[:, :3, 3].T.astype(np.float32)  # (3, T)
        self.turn = poses[:, :3, :3].transpose(1, 0, 2).astype(np.float32)  # (3 world, T, 3 camera)
        self.slopes = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32) * np.float32(np.tan(FOV / 2))
        self.yaw = np.stack([np.cos(scene.yaw), np.sin(scene.yaw)], axis=1).astype(np.float32)
        # The camera z of every direction is 1, so that the ray parameter is the z-depth.
        across = self.turn[..., 0, None] * self.slopes + self.turn[..., 2, None]
        down = self.turn[..., 1, None] * self.slopes
        rays = across[:, :, None, :] + down[..., None]  # (3, T, H, W)
        self.frame = np.repeat(np.arange(len(poses)), size**2)
        self.rays = rays.reshape(3, -1)
        self._intersect_floor()
        for k in range(len(scene.shapes)):
            self._intersect_object(k)

    def _intersect_floor(self) -> None:
        size = self.size**2
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            depth = np.repeat(-self.eye[2], size) / self.rays[2]
            x = np.repeat(self.eye[0], size) + depth * self.rays[0]
            y = np.repeat(self.eye[1], size) + depth * self.rays[1]
            seen = (depth > 0) & (np.maximum(np.abs(x), np.abs(y)) <= FLOOR_EXTENT)
        self.depth = np.where(seen, depth, np.float32(np.inf))
        self.seg = seen.astype(np.uint8)  # SKY or FLOOR

    def _intersect_object(self, k: int) -> None:
        index = self._rays_near(k)
        frame = self.frame[index]
        origin = self._to_local(k, self.eye - self.centres[k])[:, frame]
        near = _entry(self.scene.shapes[k], self.scene.radii[k], origin, self._to_local(k, self.rays[:, index]))
        hit = near < self.depth[index]
        self.depth[index[hit]] = near[hit]
        self.seg[index[hit]] = FIRST_OBJECT + k

    def _rays_near(self, k: int) -> np.ndarray:
        """Returns the indices of the rays in the screen rectangle around the bounding sphere of object k."""
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
        """Returns the colour of every ray, (n, 3) uint8."""
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
                half_radius = np.float32(self.scene.radii[k] / 2)
                patches = np.floor(local / half_radius + np.float32(0.5)).astype(np.int32).sum(0)
                shades = np.array([1, DARK_PATCH], np.float32)[:, None]
                albedo = (shades * np.array(COLOURS[self.scene.colours[k]], np.float32))[patches & 1]
            facing[self._in_shadow(surface - FIRST_OBJECT, points, frame)] *= np.float32(SHADOW)
            light = np.float32(AMBIENT) + np.float32(1 - AMBIENT) * facing
            image[index] = (albedo * light[:, None] * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        return image

    def _facing(self, k: int, local: np.ndarray) -> np.ndarray:
        """Returns the cosine of light and surface normal of object k at local points, clamped at 0, (n,)."""
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
        x, y, z = light[:, None] * normal  # not a matrix product, which rounds differently on different machines
        return np.maximum(x + y + z, np.float32(0))

    def _in_shadow(self, own: int, points: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Returns True where an object other than `own` blocks the light, (n,) bool; convex objects never shade
        themselves."""
        shadow = np.zeros(len(frame), bool)
        for k, shape in enumerate(self.scene.shapes):
            if k == own:
                continue
            bound = np.float32(self.scene.radii[k] * BOUND[shape])
            x, y, z = offset = points - self.centres[k][:, frame]
            along = LIGHT[0] * x + LIGHT[1] * y + LIGHT[2] * z
            index = np.flatnonzero((x * x + y * y + z * z - along * along < bound**2) & (along < bound))
            light = np.repeat(self._to_local(k, LIGHT)[:, None], len(index), axis=1)
            near = _entry(shape, self.scene.radii[k], self._to_local(k, offset[:, index]), light)
            shadow[index[np.isfinite(near)]] = True
        return shadow


def _entry(shape: str, radius: float, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Returns the ray parameter (n,) of the first hit of rays (3, n) in local coordinates; inf without a hit.

    Every shape is an intersection of intervals: a sphere of one ball, a cylinder of a tube and a slab, a box of three
    slabs.
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
    closest = origin + middle * direction  # more accurate than b² - 4ac, which loses the rim in float32
    half = np.sqrt(np.maximum((radius * radius - (closest * closest).sum(0)) / square, 0))
    return middle - half, middle + half  # empty (near = far) if the ray misses


def _slab(origin: np.ndarray, direction: np.ndarray, half: np.float32) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (-half - origin) / direction, (half - origin) / direction
    return np.minimum(low, high), np.maximum(low, high)
