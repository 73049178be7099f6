"""Live viewer of a scene in a browser, served by viser; frames are rendered by this package's rasterizer."""

import math
import threading
import time as clock
from typing import Any

import torch
from torch import Tensor

from blueberry_video.inference.camera_paths import orbit_of
from blueberry_video.inference.render import TrainedScene
from blueberry_video.installation import install_command
from blueberry_video.models.gaussian_splatting import Camera
from blueberry_video.ops.rasterizer.projection import rotations

MOVING_HEIGHT = 128  # rows of a frame while the camera or the time changes
PERIOD = 1 / 30  # seconds between two looks at the state


class LiveViewer:
    """Server that renders the camera of each browser when it or the time changes.

    Args:
        scene: trained scene.
        host: address to listen at; the default accepts connections from this machine only.
        port: port; the next free one if it is in use.
        height: rows of a frame at rest; ``None``: twice those of training.
        seconds: duration of a pass through the scene.

    Raises:
        ImportError: without viser.
        ValueError: for a port or height out of range.
    """

    def __init__(
        self,
        scene: TrainedScene,
        host: str = "127.0.0.1",
        port: int = 8080,
        height: int | None = None,
        seconds: float = 5.0,
    ):
        if not 1 <= port <= 65535:
            raise ValueError(f"port={port} must be 1 to 65535, such as 8080.")
        if height is not None and height < 1:
            raise ValueError(f"height={height} must be at least 1.")
        viser = _import_viser()
        self.scene, self.seconds = scene, seconds
        self.height = 2 * scene.image_size[0] if height is None else height
        self._shown: dict[int, tuple[Any, int]] = {}  # of each client: state and rows of its last frame
        self._stop = threading.Event()
        orbit = orbit_of(scene.poses)
        start = orbit.poses(torch.zeros(1))[0, :3, 3].double()
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        self.server.scene.set_up_direction(tuple(orbit.axes[:, 2].tolist()))
        self.time = self.server.gui.add_slider("time", min=0.0, max=1.0, step=0.001, initial_value=0.0)
        self.play = self.server.gui.add_checkbox("play", initial_value=False)
        fov = 2 * math.atan(scene.image_size[0] / 2 / float(scene.intrinsics[1, 1]))

        @self.server.on_client_connect
        def connect(client: Any) -> None:
            client.camera.up_direction = tuple(orbit.axes[:, 2].tolist())
            client.camera.position, client.camera.look_at = tuple(start.tolist()), tuple(orbit.target.tolist())
            client.camera.fov = fov

        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    def serve(self) -> None:
        """Prints the address and serves until the process is interrupted."""
        print(f"the scene is at {self.url}; Ctrl-C ends", flush=True)
        try:
            while self._thread.is_alive():
                clock.sleep(0.2)
        finally:
            self.close()

    def close(self) -> None:
        """Stops the server."""
        self._stop.set()
        self._thread.join()
        self.server.stop()

    @torch.no_grad()
    def frame(self, wxyz: Any, position: Any, fov: float, aspect: float, time: float, height: int) -> Tensor:
        """Renders uint8 (H, W, 3) of a camera.

        Args:
            wxyz, position: rotation (4,) and center (3,) of the OpenCV camera-to-world transform.
            fov: vertical field of view in radians.
            aspect: width divided by height.
            time: from 0 to 1.
            height: rows.
        """
        pose = torch.eye(4, dtype=torch.float64)
        quat = torch.tensor([float(value) for value in wxyz], dtype=torch.float64)
        pose[:3, :3] = rotations(quat)
        pose[:3, 3] = torch.tensor([float(value) for value in position], dtype=torch.float64)
        width, focal = max(1, round(height * aspect)), height / 2 / math.tan(fov / 2)
        intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        means = self.scene.model.gaussians.means
        camera = Camera.from_pose(pose.to(means), intrinsics.to(means), (height, width))
        color = self.scene.model.render(camera, time, self.scene.background.to(means)).color
        return color.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu()

    def update(self) -> None:
        """Renders the clients of which the camera or time has changed, first with few rows."""
        clients = self.server.get_clients()
        self._shown = {number: shown for number, shown in self._shown.items() if number in clients}
        for number, client in clients.items():
            camera = client.camera
            state = (*camera.wxyz, *camera.position, camera.fov, camera.aspect, self.time.value)
            known, rows = self._shown.get(number, (None, 0))
            height = min(self.height, MOVING_HEIGHT) if known != state else self.height
            if known == state and rows == height:
                continue
            frame = self.frame(camera.wxyz, camera.position, camera.fov, camera.aspect, self.time.value, height)
            client.scene.set_background_image(frame.numpy(), format="jpeg")
            self._shown[number] = state, height

    def _run(self) -> None:
        last = clock.monotonic()
        while not self._stop.wait(PERIOD):
            now = clock.monotonic()
            if self.play.value:
                self.time.value = (self.time.value + (now - last) / self.seconds) % 1
            last = now
            self.update()


def _import_viser() -> Any:
    try:
        import viser
    except ImportError as error:
        raise ImportError(
            f"the live viewer requires the package viser ({error}): `{install_command('viewer', 'viser>=1.0')}`."
        ) from error
    return viser
