"""Depth of long videos: memory and time per frame, and the quality of each mode of inference.

run: python benchmarks/depth_streaming.py [run of task=depth …]     (ten minutes; without runs only memory and time)

Memory: 2,000 frames are evaluated and written as NPZ shards in every mode, each in a separate process, with untrained
tiny models at 64 x 64 pixels; largest resident memory before frame 100 and after it, CPU time per frame early and
late. Quality: the maps of each run on held-out clips of the world, of 64 frames, aligned once per clip: AbsRel, δ1, TAE
without the floor of the ground truth, and flicker.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from blueberry_video.data.depth_writer import DepthWriter
from blueberry_video.data.sensor_noise import SensorNoise
from blueberry_video.data.world import World
from blueberry_video.evaluation.depth_metrics import aligned_depth, depth_accuracy, flicker, temporal_alignment_error
from blueberry_video.experiment.trained import load_trained
from blueberry_video.inference.depth import Mode, depth_stream
from blueberry_video.models.depth_anything import VideoDepthAnything
from blueberry_video.tasks.depth import Depth

FRAMES, EARLY, CLIPS, LENGTH, TOLERANCE = 2000, 100, 24, 64, 0.05
MODES = [("tiny", "windows"), ("tiny", "stream"), ("tiny", "sliding"), ("tiny_scan", "stream"), ("tiny_none", "frames")]


def memory(name: str, mode: str) -> None:
    """Evaluates and writes 2,000 frames; prints memory and time."""
    torch.manual_seed(0)
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base=None):
        model = instantiate(compose(overrides=[f"+model=video_depth_anything/{name}"]).model).eval()
    process, seconds, resident = psutil.Process(), [], []
    with tempfile.TemporaryDirectory() as folder:
        stream = depth_stream(model, (64, 64), 64, mode)  # type: ignore[arg-type]
        writer = DepthWriter(Path(folder) / "maps", ["npz"], {}, "disparity")
        for start in range(0, FRAMES, 4):
            frames = torch.from_numpy(np.random.default_rng(start).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
            begun = time.process_time()
            maps = stream.push(frames)
            writer.add(maps, {"pushed": start + 4, "stream": stream.state_dict()})
            seconds.append((time.process_time() - begun) / 4)
            resident.append(process.memory_info().rss / 2**20)
        writer.add(stream.finish())
        frames_written = writer.finish(24.0)["frames"]
    at, largest = max(resident[: EARLY // 4]), max(resident[EARLY // 4 :])
    half = len(seconds) // 2
    early, late = (1e3 * statistics.mean(part) for part in (seconds[EARLY // 4 : half], seconds[half:]))
    print(
        f"{name:10} {mode:8} {frames_written} frames: at most {at:.0f} MB before frame {EARLY}, {largest:.0f} MB after "
        f"({100 * (largest / at - 1):+.1f} %); {early:.1f} ms a frame early, {late:.1f} ms late",
        flush=True,
    )


def quality(source: str) -> None:
    """Prints the scores of every mode that fits the model of a run."""
    run = load_trained(source, [Depth])
    model, mean, std = run.task.model, run.task.pixel_mean.flatten().tolist(), run.task.pixel_std.flatten().tolist()
    side, camera = min(model.pretrained.video_size[2:]), run.data.val
    world = World("test", CLIPS, LENGTH, side, camera=["static", "orbit", "pan", "dolly"], supersample=1)
    noisy = SensorNoise(world, camera.sigma, camera.exposure, camera.seed, camera.lost, camera.block)
    clips = [noisy[index] for index in range(CLIPS)]
    depth = torch.stack([clip["depth"] for clip in clips])
    cameras = [torch.stack([clip[key] for clip in clips]) for key in ("intrinsics", "poses")]
    floor = temporal_alignment_error(depth, depth, *cameras, TOLERANCE)
    modes: list[Mode] = ["frames"]
    if isinstance(model, VideoDepthAnything):
        modes += ["stream"] if model.streams_exactly else ["windows", "sliding", "stream"]
    for mode in modes:
        maps, begun = [], time.process_time()
        for clip in clips:
            stream = depth_stream(model, (side, side), side, mode)
            stream.mean, stream.std = tuple(mean), tuple(std)
            maps.append(torch.cat([stream.push(clip["video"]), stream.finish()]))
        seconds = (time.process_time() - begun) / (CLIPS * LENGTH)
        found = aligned_depth(torch.stack(maps), depth)
        scores = depth_accuracy(found, depth)
        excess = temporal_alignment_error(found, depth, *cameras, TOLERANCE) - floor
        print(
            f"{run.config.name} {run.path.name} {mode:8} AbsRel {scores.abs_rel.mean():.4f}  δ1 "
            f"{scores.delta1.mean():.4f}  TAE without floor {excess.nanmean():.3f}  flicker "
            f"{flicker(found, depth).nanmean():.3f}  {1e3 * seconds:.1f} ms a frame",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory(*sys.argv[2:])
    else:
        for each in MODES:
            subprocess.run([sys.executable, __file__, "--memory", *each], check=True)
        for run in sys.argv[1:]:
            quality(run)
