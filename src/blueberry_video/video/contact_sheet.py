"""Contact sheet of the selected frames of a video."""

import math
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blueberry_video.video.formats import to_pil
from blueberry_video.video.sampling import uniform

MAX_WIDTH = 1600  # pixels of the sheet
MIN_WIDTH = 640  # leaves space for a title above a single frame
MAX_COLUMNS = 20
MAX_THUMBNAILS = 60
_CELL = 300  # pixels of the longer side of a thumbnail, at most
_GAP, _BORDER = 10, 4
_TITLE_SIZE, _LABEL_SIZE = 18, 14
_BACKGROUND, _TEXT_COLOR, _RED, _ORANGE = "white", "black", "#d00000", "#c06000"


def contact_sheet(
    frames: Tensor,
    timestamps: Tensor,
    missing: Tensor | None = None,
    suspect: Tensor | None = None,
    columns: int | None = None,
    title: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Draws rows of thumbnails with timestamps, or other labels.

    Missing frames have a red border, suspect ones an orange border.

    Args:
        frames: uint8 (T, 3, H, W) RGB. Of more than 60 frames, 60 evenly spaced ones are drawn; the title gets a line.
        timestamps: (T,) seconds.
        missing: bool (T,), True where a frame replaces one that could not be decoded.
        suspect: bool (T,), True where a frame was decoded after damage.
        columns: 1 to 20; None selects a number for a sheet of about 3:2.
        title: lines at the top. Long lines are wrapped, and characters that PIL's font lacks are converted to ASCII.
        labels: (T,) text below the thumbnails, cut to their width; None draws the timestamps.

    Returns:
        An RGB image, 640 to 1600 pixels wide.

    Raises:
        TypeError, ValueError: frames are not uint8 (T, 3, H, W), lengths differ, or columns is out of range.
    """
    if columns is not None and not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"columns={columns} must be 1 to {MAX_COLUMNS}, or None.")
    total = len(frames)
    for name, values in (("timestamps", timestamps), ("missing", missing), ("suspect", suspect)):
        if values is not None and tuple(values.shape) != (total,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, but there are {total} frames: pass one each.")
    shown = uniform(total, min(total, MAX_THUMBNAILS)) if total else []
    pictures = to_pil(frames[shown])
    colors = [_TEXT_COLOR] * total
    for mask, color in ((suspect, _ORANGE), (missing, _RED)):
        if mask is not None:
            colors = [color if marked else old for marked, old in zip(mask.tolist(), colors)]

    lines = list(title)
    if len(shown) < total:
        lines.append(f"{len(shown)} of {total} frames are shown, evenly spaced.")
    if num_missing := colors.count(_RED):
        lines.append(f"{num_missing} of {total} frames could not be decoded: red border.")
    if num_suspect := colors.count(_ORANGE):
        lines.append(f"{num_suspect} of {total} frames were decoded after damage: orange border.")

    for_3_to_2 = round(math.sqrt(1.5 * len(shown) * pictures[0].height / pictures[0].width))
    columns = min(columns or min(max(for_3_to_2, 1), MAX_COLUMNS), len(shown))
    max_width = (MAX_WIDTH - _GAP) // columns - _GAP - 2 * _BORDER
    scale = min(_CELL / max(pictures[0].size), max_width / pictures[0].width)
    thumb_width, thumb_height = (max(round(side * scale), 1) for side in pictures[0].size)
    texts = {i: _time(float(timestamps[i])) if labels is None else _ascii(labels[i]) for i in shown}
    title_font, label_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_LABEL_SIZE)
    label_width = max(label_font.getlength(text) for text in texts.values())
    cell_width = min(max(thumb_width + 2 * _BORDER, math.ceil(label_width)), max_width + 2 * _BORDER) + _GAP
    cell_height = thumb_height + 2 * _BORDER + _LABEL_SIZE + 2 * _GAP
    width = max(columns * cell_width + _GAP, MIN_WIDTH)
    lines = [part for line in lines for part in _wrapped(_ascii(line), title_font, width - 2 * _GAP)]
    top = len(lines) * (_TITLE_SIZE + 6) + (2 * _GAP if lines else _GAP)

    sheet = Image.new("RGB", (width, top + math.ceil(len(shown) / columns) * cell_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((_GAP, _GAP + row * (_TITLE_SIZE + 6)), line, fill=_TEXT_COLOR, font=title_font)
    for cell, (i, picture) in enumerate(zip(shown, pictures)):
        left, upper = _GAP + cell % columns * cell_width, top + cell // columns * cell_height
        if colors[i] != _TEXT_COLOR:
            corner = (left + thumb_width + 2 * _BORDER - 1, upper + thumb_height + 2 * _BORDER - 1)
            draw.rectangle((left, upper, *corner), fill=colors[i])
        small = picture.resize((thumb_width, thumb_height), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + _BORDER, upper + _BORDER))
        label = (left + _BORDER, upper + thumb_height + 2 * _BORDER + 2)
        draw.text(label, next(_wrapped(texts[i], label_font, cell_width), ""), fill=colors[i], font=label_font)
    return sheet


def _time(seconds: float) -> str:
    """Formats seconds as 12.34 s, 3:07.50 or 1:02:03.40."""
    if round(seconds * 100) < 6000:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds * 100), 6000)
    hours, minutes = divmod(minutes, 60)
    clock = f"{rest // 100:02d}.{rest % 100:02d}"
    return f"{hours}:{minutes:02d}:{clock}" if hours else f"{minutes}:{clock}"


def _ascii(line: str) -> str:
    """Converts to ASCII, which the font covers: é to e, × to x, … to ..., and everything else to ?."""
    plain = unicodedata.normalize("NFKD", line.replace("\u00d7", "x").replace("·", "*"))
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).encode("ascii", "replace").decode()


def _wrapped(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> Iterator[str]:
    """Wraps a line to ``width`` at spaces, and inside words that are too long (paths)."""
    part = ""
    for word in line.split(" "):
        longer = f"{part} {word}" if part else word
        if font.getlength(longer) <= width:
            part = longer
            continue
        if part:
            yield part
        part = word
        while font.getlength(part) > width:
            fitting = max(sum(font.getlength(part[: n + 1]) <= width for n in range(len(part))), 1)
            yield part[:fitting]
            part = part[fitting:]
    yield part
