"""Writer of depth: formats, ranges, continuation after a kill, broken videos."""

import hashlib
import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blueberry_video.data.depth_writer import DepthWriter, write_maps
from blueberry_video.data.write import write_video
from blueberry_video.video.container import open_video
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.errors import BrokenVideoError

SETTINGS = {"video": "a", "weights": "b"}


def maps(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 6, 8, generator=torch.Generator().manual_seed(seed)) * 4 + 1


def files(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


class Mean:
    """Running mean of gray values: a stream with a state. Raises at a frame, as a killed process ends there."""

    def __init__(self, killed_at: int | None = None):
        self.sum, self.count, self.killed_at = 0.0, 0, killed_at

    def push(self, frames: Tensor) -> Tensor:
        found = []
        for frame in frames:
            if self.count == self.killed_at:
                raise KeyboardInterrupt
            self.sum, self.count = self.sum + float(frame.double().mean()), self.count + 1
            found.append(frame.float().mean(0) + self.sum / self.count)
        return torch.stack(found)

    def finish(self) -> Tensor:
        return torch.empty(0, 16, 16)

    def state_dict(self) -> dict:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.sum, self.count = state["sum"], state["count"]


def video(path: Path, frames: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    write_video(path, pixels, 10.0)
    return path


def run(path: Path, out: Path, stream: Mean, formats=("npz", "png", "mp4"), **options) -> dict:
    writer = DepthWriter(out, formats, SETTINGS, "disparity", **options)
    with open_video(path) as opened:
        return write_maps(opened, DecodeOptions(salvage=False, chunk_frames=1), stream, writer)


def test_every_format_holds_the_maps(tmp_path: Path) -> None:
    pytest.importorskip("OpenEXR")
    import OpenEXR

    values, writer = (
        maps(50),
        DepthWriter(tmp_path / "out", ["npz", "png", "exr", "mp4"], SETTINGS, "depth", shard_size=16),
    )
    for part in values.split(7):
        writer.add(part)
    about = writer.finish(12.0)
    low, high = float(values.min()), float(values.max())
    assert (about["kind"], about["unit"], about["frames"], about["extremes"]) == ("depth", "m", 50, [low, high])
    shards = [np.load(file)["depth"] for file in sorted((tmp_path / "out/npz").glob("*.npz"))]
    assert [len(shard) for shard in shards] == [16, 16, 16, 2]
    assert np.array_equal(np.concatenate(shards), values.numpy())
    sidecar = json.loads((tmp_path / "out/png/depth.json").read_text())
    for index in (0, 17, 49):
        stored = np.array(Image.open(tmp_path / f"out/png/{index:08d}.png"))
        assert stored.dtype == np.uint16
        read = sidecar["offset"] + sidecar["scale"] * stored
        assert np.abs(read - values[index].numpy()).max() <= sidecar["scale"] / 2 + 1e-6
        with OpenEXR.File(str(tmp_path / f"out/exr/{index:08d}.exr")) as image:
            assert np.array_equal(image.channels()["Z"].pixels, values[index].numpy())
    with av.open(str(tmp_path / "out/depth.mp4")) as container:
        assert (container.streams.video[0].frames, float(container.streams.video[0].average_rate)) == (50, 12.0)
    assert not (tmp_path / "out/.unfinished").exists()


def test_colors_and_levels_have_one_range(tmp_path: Path) -> None:
    values = torch.stack([torch.full((6, 8), value) for value in (0.0, 4.0, 8.0, 30.0)])
    for name, limits, expected in (
        ("own", None, [0, 8738, 17476, 65535]),
        ("set", (0.0, 20.0), [0, 13107, 26214, 65535]),
    ):
        writer = DepthWriter(tmp_path / name, ["png"], SETTINGS, "depth", limits)
        writer.add(values)
        writer.finish(5.0)
        assert [np.array(Image.open(tmp_path / name / f"png/{i:08d}.png"))[0, 0] for i in range(4)] == expected
        assert not (tmp_path / name / "npz").exists()


@pytest.mark.parametrize("killed_at", [0, 5, 32, 33, 70, 99])
def test_a_killed_job_continues_to_the_same_files(tmp_path: Path, killed_at: int) -> None:
    path = video(tmp_path / "a.mp4", 100)
    run(path, tmp_path / "whole", Mean())
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "killed", Mean(killed_at))
    assert not (tmp_path / "killed/depth.json").exists()
    stream = Mean()
    run(path, tmp_path / "killed", stream)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_kill_while_formats_are_written_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, count = video(tmp_path / "a.mp4", 70), itertools.count()
    run(path, tmp_path / "whole", Mean())
    write = DepthWriter._written

    def killed(writer):
        for each in write(writer):
            if next(count) == 90:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(DepthWriter, "_written", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "killed", Mean())
    run(path, tmp_path / "killed", Mean())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_folder_is_kept_and_a_different_one_refused(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 3)
    run(path, tmp_path / "out", Mean())
    assert DepthWriter(tmp_path / "out", ("npz", "png", "mp4"), SETTINGS, "disparity").done
    with pytest.raises(FileExistsError, match=r"weights was b and is c"):
        DepthWriter(tmp_path / "out", ("npz", "png", "mp4"), {**SETTINGS, "weights": "c"}, "disparity")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"out=.*mine"):
        DepthWriter(tmp_path / "mine", ("npz",), SETTINGS, "disparity")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_frames_before_damage_are_written_and_the_reason_is_reported(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 60)
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises((BrokenVideoError, ValueError)):  # an mp4 without its index has no frame
        run(tmp_path / "cut.mp4", tmp_path / "none", Mean())
    stream = path.with_suffix(".mkv")
    with av.open(str(path)) as source, av.open(str(stream), "w") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)
    whole = run(stream, tmp_path / "whole", Mean(), ("npz",))
    assert whole["frames"] == 60
    assert "error" not in whole
    data = bytearray(stream.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "damaged.mkv").write_bytes(data)
    found = run(tmp_path / "damaged.mkv", tmp_path / "part", Mean(), ("npz",))
    assert 10 < found["frames"] < 60
    assert found["error"] == json.loads((tmp_path / "part/depth.json").read_text())["error"]
    shards = [
        np.concatenate([np.load(f)["disparity"] for f in sorted((tmp_path / name / "npz").glob("*.npz"))])
        for name in ("part", "whole")
    ]
    assert np.array_equal(shards[0], shards[1][: found["frames"]])
    again = run(stream, tmp_path / "part", Mean(), ("npz",))  # the file was replaced by a whole one
    assert again["frames"] == 60
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_wrong_arguments_raise(tmp_path: Path) -> None:
    for formats in ([], ["npz", "jpg"]):
        with pytest.raises(ValueError, match=r"formats=.*png"):
            DepthWriter(tmp_path / "out", formats, SETTINGS, "depth")
    with pytest.raises(ValueError, match=r"range=\[3, 3\].*0 and 20"):
        DepthWriter(tmp_path / "out", ["png"], SETTINGS, "depth", (3, 3))
    assert not (tmp_path / "out").exists()


def test_odd_sizes_lose_a_row_of_the_mp4_only(tmp_path: Path) -> None:
    writer = DepthWriter(tmp_path / "out", ["npz", "png", "mp4"], SETTINGS, "disparity")
    values = torch.rand(3, 17, 33)
    writer.add(values)
    writer.finish(5.0)
    assert np.array_equal(np.load(tmp_path / "out/npz/depth_00000.npz")["disparity"], values.numpy())
    assert Image.open(tmp_path / "out/png/00000000.png").size == (33, 17)
    with av.open(str(tmp_path / "out/depth.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (16, 32)


def test_a_constant_video_has_a_range(tmp_path: Path) -> None:
    writer = DepthWriter(tmp_path / "out", ["png", "mp4"], SETTINGS, "disparity")
    writer.add(torch.full((2, 16, 16), 3.0))
    writer.finish(5.0)
    sidecar = json.loads((tmp_path / "out/png/depth.json").read_text())
    stored = np.array(Image.open(tmp_path / "out/png/00000001.png"))
    assert np.allclose(sidecar["offset"] + sidecar["scale"] * stored, 3.0)
