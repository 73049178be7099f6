"""Contact sheet: position and timestamp of every frame, red border of missing frames."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from blueberry_video.video.contact_sheet import MAX_THUMBNAILS, contact_sheet

RED = (208, 0, 0)


def colored(num_frames: int, height: int = 90, width: int = 160) -> Tensor:
    """Frames of one color each, with rising green, falling blue and no red."""
    frames = torch.zeros(num_frames, 3, height, width, dtype=torch.uint8)
    for i in range(num_frames):
        frames[i, 1], frames[i, 2] = 60 + i * 195 // max(num_frames, 2), 255 - i * 195 // max(num_frames, 2)
    return frames


def colors(sheet: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in sheet.getcolors(sheet.width * sheet.height)}  # type: ignore[misc]


def has_text(sheet: Image.Image, rows: slice, columns: slice) -> bool:
    return bool((np.asarray(sheet)[rows, columns].max(axis=-1) < 90).any())


def test_frames_are_drawn_in_rows_with_timestamps():
    frames = colored(5)
    sheet = contact_sheet(frames, torch.arange(5) / 2, columns=2)
    pixels = np.asarray(sheet)
    tops = []
    for i, frame in enumerate(frames):
        rows, columns = np.nonzero((pixels == frame[:, 0, 0].numpy()).all(axis=-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (169, 300)  # 160 x 90, enlarged to the size of a cell
        assert (columns.min() < sheet.width / 2) == (i % 2 == 0)
        assert has_text(sheet, slice(rows.max() + 1, rows.max() + 24), slice(columns.min(), columns.min() + 60))
        tops.append(int(rows.min()))
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]


def test_missing_frames_have_a_red_border_and_are_counted():
    frames, timestamps = colored(4), torch.arange(4.0)
    whole = contact_sheet(frames, timestamps, torch.zeros(4, dtype=torch.bool))
    assert RED not in colors(whole)
    assert whole.size == contact_sheet(frames, timestamps).size
    sheet = contact_sheet(frames, timestamps, torch.tensor([False, True, False, False]), columns=2)
    assert sheet.height > contact_sheet(frames, timestamps, columns=2).height  # one more line of the title
    pixels = np.asarray(sheet)
    rows, columns = np.nonzero((pixels == frames[1, :, 0, 0].numpy()).all(axis=-1))
    border = pixels[rows.min() - 4 : rows.max() + 5, columns.min() - 4 : columns.max() + 5].copy()
    border[4:-4, 4:-4] = RED
    assert (border == RED).all()
    rest = pixels.copy()
    rest[:, columns.min() - 4 :] = 0
    assert not (rest == RED).all(axis=-1).any()


def test_a_long_video_is_subsampled_and_the_title_mentions_it():
    frames = colored(150, 9, 16)
    sheet = contact_sheet(frames, torch.arange(150) * 60.0)
    drawn = colors(sheet)
    shown = [tuple(frame[:, 0, 0].tolist()) in drawn for frame in frames]
    assert len({tuple(frame[:, 0, 0].tolist()) for frame in frames}) == 150
    assert sum(shown) == MAX_THUMBNAILS
    assert shown[0]
    assert shown[-1]
    assert np.diff(np.flatnonzero(shown)).max() == 3
    assert has_text(sheet, slice(8, 30), slice(0, 400))


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (8, 1600), (1600, 8), (1, 1)])
@pytest.mark.parametrize(("num_frames", "columns"), [(1, None), (60, None), (60, 20), (60, 1), (3, 20)])
def test_width_and_height_are_limited(height: int, width: int, num_frames: int, columns: int | None):
    frames = colored(num_frames, height, width)
    sheet = contact_sheet(frames, torch.arange(num_frames) * 500.0, columns=columns)
    assert 640 <= sheet.width <= 1600
    assert sheet.height <= (400 if num_frames == 1 else 60 * 400)


def test_long_lines_are_wrapped_within_the_sheet():
    frames, timestamps = colored(1), torch.zeros(1)
    short = contact_sheet(frames, timestamps, title=["short"])
    for line in ("words " * 40, "letters" * 40):
        sheet = contact_sheet(frames, timestamps, title=[line])
        assert sheet.height >= short.height + 2 * 24
        assert not has_text(sheet, slice(0, sheet.height), slice(sheet.width - 8, sheet.width))


def test_characters_that_the_font_lacks_are_converted_to_ascii():
    frames, timestamps = colored(1), torch.zeros(1)

    def pixels(line: str) -> bytes:
        return contact_sheet(frames, timestamps, title=[line]).tobytes()

    assert pixels("caf\u00e9, 3 \u00d7 4\u2026") == pixels("cafe, 3 x 4...")
    assert pixels("\u6620\u753b") == pixels("??")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.00 s"), (59.994, "59.99 s"), (59.996, "1:00.00"), (187.5, "3:07.50"), (3723.4, "1:02:03.40")],
)
def test_timestamps_are_formatted_as_a_clock(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **style: written.append(text))
    contact_sheet(colored(1), torch.tensor([seconds], dtype=torch.float64))
    assert written == [text]


def test_invalid_arguments_raise():
    frames, timestamps = colored(3), torch.arange(3.0)
    for columns in (0, 21):
        with pytest.raises(ValueError, match=f"columns={columns} "):
            contact_sheet(frames, timestamps, columns=columns)
    with pytest.raises(ValueError, match=r"timestamps .*\(2,\).*3 frames"):
        contact_sheet(frames, timestamps[:2])
    with pytest.raises(ValueError, match=r"missing .*\(4,\).*3 frames"):
        contact_sheet(frames, timestamps, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"float32.*uint8"):
        contact_sheet(frames.float(), timestamps)
    with pytest.raises(ValueError, match=r"\(0, 3, 90, 160\)"):
        contact_sheet(frames[:0], timestamps[:0])
