"""Rendering entry point: writes a trained scene as a video, as Gaussians for other viewers, and as an HTML page.

    python -m blueberry_video.render outputs/<name>[/<run>] --out scene [--format mp4,ply,html]
        [--path turntable|train|fixed|cameras.json] [--size 256 | 256x384] [--frames 120] [--fps 24] [--times 0,1]
        [--background white|black|r,g,b] [--camera 0] [--key-times 24] | --live [--port 8080]

The run is one of the task ``splatting``. A killed command writes the missing files when it is repeated.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from blueberry_video.inference.render import TrainedScene

FORMATS = ("mp4", "ply", "html")


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry render", allow_abbrev=False)
    parser.add_argument("run", help="run folder, or experiment's folder: its newest run")
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--format", default="mp4", help="mp4, ply (one file per frame), html, separated by commas")
    parser.add_argument("--path", default="turntable", help="turntable, train, fixed, or a .json file of cameras")
    parser.add_argument("--size", help="height, or height x width such as 256x384; default: of training")
    parser.add_argument("--frames", type=int, help="default: 120, or the cameras of the file")
    parser.add_argument("--fps", type=float, default=24.0, help="frames per second")
    parser.add_argument("--times", help="key times, such as 0.5 for one time; default: 0,1, or those of the file")
    parser.add_argument("--background", help="white, black or r,g,b from 0 to 1; default: of training")
    parser.add_argument("--camera", type=int, default=0, help="index of the training camera of --path fixed")
    parser.add_argument("--key-times", type=int, default=24, help="least number of times of a deformation in html")
    parser.add_argument("--live", action="store_true", help="serve the scene to browsers, with viser")
    parser.add_argument("--port", type=int, default=8080, help="port of --live")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    if known.live:
        from blueberry_video.inference.live_viewer import LiveViewer

        return LiveViewer(open_scene(known.run, known.background), port=known.port).serve()
    if not known.out:
        raise ValueError("--out is missing: add --out <folder> (OUT=<folder> with make), or --live.")
    formats = [each.strip() for each in known.format.split(",")]
    names = ("path", "size", "frames", "fps", "times", "background", "camera", "key_times")
    files = render_scene(known.run, known.out, formats, **{name: getattr(known, name) for name in names})
    for folder in dict.fromkeys(file.parent if file.suffix == ".ply" else file for file in files):
        own = [file for file in files if folder in (file, file.parent)]
        print(f"wrote {folder} ({len(own)} file{'s'[: len(own) > 1]}, {sum(f.stat().st_size for f in own):,} bytes)")


def render_scene(
    run: str | Path,
    out: str | Path,
    formats: Sequence[str] = ("mp4",),
    path: str | Path = "turntable",
    size: str | Sequence[int] | None = None,
    frames: int | None = None,
    fps: float = 24.0,
    times: str | Sequence[float] | None = None,
    background: str | Sequence[float] | None = None,
    camera: int = 0,
    key_times: int = 24,
) -> list[Path]:
    """Writes ``render.mp4``, ``ply/frame_0000.ply``, … and ``scene.html``; returns the files.

    Args:
        run: run folder, or folder of an experiment (its newest run).
        out: folder. If a call with the same settings has left it, only missing files are written.
        formats: of ``mp4``, ``ply``, ``html``.
        path: ``turntable``, ``train`` or ``fixed``, see :func:`~blueberry_video.inference.render.camera_path`; or a
            .json file, see :func:`~blueberry_video.data.camera_file.read_camera_file`.
        size: height, or height and width, also as a string such as "256x384"; ``None``: that of training.
        frames: ``None``: 120, or the number of cameras of the file.
        times: key times, interpolated linearly over the frames, also as a string such as "0,1"; ``None``: from 0 to 1,
            or those of the file.
        background: "white", "black", "r,g,b" or (r, g, b) from 0 to 1; ``None``: that of training.
        camera: index of the training camera of ``fixed``.
        key_times: see :func:`~blueberry_video.inference.scene_viewer.write_viewer`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: without run or camera file; for a folder with other content; for
            arguments out of range.
    """
    from blueberry_video.data.camera_file import read_camera_file
    from blueberry_video.data.render_folder import open_render_folder
    from blueberry_video.data.write import write_videos
    from blueberry_video.inference.camera_paths import key_times_of
    from blueberry_video.inference.render import camera_path, path_of_cameras, render_frames, size_of
    from blueberry_video.inference.scene_viewer import write_viewer
    from blueberry_video.models.gaussian_splatting.ply import write_sequence

    if not formats or set(formats) - set(FORMATS):
        raise ValueError(f"format={','.join(formats)} must be one or several of {', '.join(FORMATS)}.")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be above 0, such as 24.")
    keys = None if times is None else key_times_of(times)
    scene = open_scene(run, background)
    pixels = size_of(size, scene.image_size, even="mp4" in formats)
    settings = {"weights": scene.fingerprint(), "path": str(path), "size": list(pixels), "fps": fps}
    settings |= {"background": scene.background.tolist(), "camera": camera, "key_times": key_times}
    if not str(path).endswith(".json"):
        chosen = camera_path(scene, str(path), pixels, frames, keys or (0.0, 1.0), camera)
    else:
        chosen = path_of_cameras(*read_camera_file(path, pixels), pixels, frames, keys)
        settings["cameras"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    settings |= {"frames": len(chosen.poses), "times": keys}
    folder = open_render_folder(out, settings)
    files = [folder / name for kind, name in (("mp4", "render.mp4"), ("html", "scene.html")) if kind in formats]
    for file in (file for file in files if not file.is_file()):
        if file.suffix == ".html":
            write_viewer(scene, file, key_times, len(chosen.poses), fps, title=Path(run).name)
        else:
            rendered = render_frames(scene.model, chosen, scene.background)
            write_videos((frame[None, :, None] for frame in rendered), [file], pixels, fps)
    if "ply" in formats:
        files += write_sequence(scene.model, folder / "ply", chosen.times.tolist(), keep_existing=True)
    return files


def open_scene(run: str | Path, background: str | Sequence[float] | None = None) -> "TrainedScene":
    """Opens a trained run, on a GPU if there is one; see :func:`render_scene`."""
    import torch

    from blueberry_video.data.clip_cache import CachedClips
    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.inference.render import TrainedScene, color_of
    from blueberry_video.tasks.splatting import Splatting

    trained = load_trained(run, [Splatting], "cuda" if torch.cuda.is_available() else "cpu")
    train = trained.data.train
    views: Any = train.dataset if isinstance(train, CachedClips) else train
    height, width = views[0]["video"].shape[-2:]
    color = trained.task.background.cpu() if background is None else color_of(background)
    return TrainedScene(trained.task.model, views.poses, views.times, views[0]["intrinsics"], (height, width), color)


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("Repeat the command to write the missing files."):
        main()
