"""Reader of a file of cameras without pictures, in the format of D-NeRF's ``transforms_*.json``."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blueberry_video.data.scene_formats import OPENGL, dnerf_intrinsics, entry, matrix, numeric, read_json
from blueberry_video.data.scene_views import View, check_intrinsics, check_pose, evenly_spaced, scaled_intrinsics


class CameraFile(NamedTuple):
    """Cameras of a file; poses are camera-to-world transforms of OpenCV cameras."""

    poses: np.ndarray  # (F, 4, 4)
    intrinsics: np.ndarray  # (F, 3, 3), in pixels
    times: np.ndarray  # (F,) from 0 to 1


def read_camera_file(path: str | Path, image_size: tuple[int, int]) -> CameraFile:
    """Reads ``frames`` with ``transform_matrix`` and optional ``time``; ``file_path`` is ignored.

    Focal lengths are those of ``camera_angle_x``, or of ``fl_x, fl_y, cx, cy`` in pixels of ``w, h``, in a frame or in
    the file. Times are evenly spaced where no frame has one.

    Args:
        image_size: height and width of the images to render; intrinsics are scaled to it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another format, a pose that is not rigid, or a time outside [0, 1].
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={path} is not a file: use a .json file with cameras, or turntable.")
    table = read_json(path)
    frames = entry(table, "frames", path, list, "a list of frames")
    if not frames:
        raise ValueError(f"frames=[] of {path} must have at least one camera.")
    timed = [isinstance(frame, dict) and frame.get("time") is not None for frame in frames]
    if any(timed) and not all(timed):
        raise ValueError(
            f"{timed.count(False)} of the {len(timed)} frames in {path} have no time: add it to all, or to none."
        )
    poses, intrinsics, times = [], [], []
    for number, frame in enumerate(frames):
        source = f"frames[{number}] of {path}"
        pose = matrix(
            entry(frame, "transform_matrix", path, list, "a 4 x 4 matrix"), (4, 4), "transform_matrix", source
        )
        settings = {**table, **frame}
        size = image_size
        if "w" in settings or "fl_x" in settings:
            size = (int(numeric(settings, "h", path, "pixels")), int(numeric(settings, "w", path, "pixels")))
        time = numeric(frame, "time", Path(source), "a number in [0, 1]", evenly_spaced(number, len(frames)))
        if not 0 <= time <= 1:  # also for NaN
            raise ValueError(f"time={time} of {source} must be in [0, 1]: divide frame indices by their number - 1.")
        view = View(
            source, path, (), time, dnerf_intrinsics(settings, size, path), pose @ OPENGL, size, source
        )  # fmt: skip
        check_pose(view)
        check_intrinsics(view)
        if not math.isclose(size[0] * image_size[1], size[1] * image_size[0], rel_tol=0.02):
            raise ValueError(
                f"size={image_size[0]}x{image_size[1]} has another aspect ratio than the camera in {source}, "
                f"{size[0]}x{size[1]} (height x width): use a size in its ratio."
            )
        poses.append(view.pose)
        intrinsics.append(scaled_intrinsics(view.intrinsics, size, image_size))
        times.append(time)
    return CameraFile(np.stack(poses), np.stack(intrinsics), np.array(times))
