"""The chosen frames on one picture, for a look before anything is spent on them."""

import math
import unicodedata
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blueberry_video.video.formats import to_pil
from blueberry_video.video.sampling import uniform

MAX_WIDTH = 1600  # pixels of the sheet
MIN_WIDTH = 640  # so that a line of the title fits over a single frame
MAX_COLUMNS = 20
MAX_THUMBNAILS = 60
_CELL = 300  # pixels of the longer side of a thumbnail, at most
_GAP, _FRAME = 10, 4
_TITLE_SIZE, _LABEL_SIZE = 18, 14
_PAPER, _INK, _RED, _ORANGE = "white", "black", "#d00000", "#c06000"


def contact_sheet(
    frames: Tensor,
    timestamps: Tensor,
    missing: Tensor | None = None,
    suspect: Tensor | None = None,
    columns: int | None = None,
    title: Sequence[str] = (),
) -> Image.Image:
    """Thumbnails in rows, each over its time; what could not be decoded framed in red, what is suspect in orange.

    Args:
        frames: uint8 (T, 3, H, W) RGB; of more than 60, 60 evenly spread ones are shown, and the sheet says so.
        timestamps: (T,) seconds.
        missing: bool (T,), true where a frame is a stand-in for one that could not be decoded.
        suspect: bool (T,), true where a frame was decoded after damage.
        columns: 1 to 20; None chooses a sheet somewhat wider than high.
        title: lines on top; long ones are wrapped, letters that PIL's own font lacks are spelt in ASCII.

    Returns:
        An RGB image, 640 to 1600 pixels wide.

    Raises:
        TypeError, ValueError: frames that are not uint8 (T, 3, H, W), lengths that differ, columns out of range.
    """
    if columns is not None and not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"columns={columns} is out of range: use 1 to {MAX_COLUMNS}, or None.")
    total = len(frames)
    for name, values in (("timestamps", timestamps), ("missing", missing), ("suspect", suspect)):
        if values is not None and tuple(values.shape) != (total,):
            raise ValueError(
                f"{name} has the shape {tuple(values.shape)}, but there are {total} frames: give one each."
            )
    shown = uniform(total, min(total, MAX_THUMBNAILS)) if total else []
    pictures = to_pil(frames[shown])
    colours = [_INK] * total
    for mask, colour in ((suspect, _ORANGE), (missing, _RED)):
        if mask is not None:
            colours = [colour if marked else before for marked, before in zip(mask.tolist(), colours)]

    lines = list(title)
    if len(shown) < total:
        lines.append(f"{len(shown)} of {total} frames are shown, evenly chosen.")
    if lost := colours.count(_RED):
        lines.append(f"{lost} of {total} frames could not be decoded: framed in red.")
    if doubtful := colours.count(_ORANGE):
        lines.append(f"{doubtful} of {total} frames were decoded after damage: framed in orange.")

    columns = min(columns or _columns(len(shown), pictures[0].width / pictures[0].height), len(shown))
    room = (MAX_WIDTH - _GAP) // columns - _GAP - 2 * _FRAME
    scale = min(_CELL / max(pictures[0].size), room / pictures[0].width)
    thumb_width, thumb_height = (max(round(side * scale), 1) for side in pictures[0].size)
    title_font, label_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_LABEL_SIZE)
    label_width = max(label_font.getlength(_time(float(timestamps[i]))) for i in shown)
    cell_width = min(max(thumb_width + 2 * _FRAME, math.ceil(label_width)), room + 2 * _FRAME) + _GAP
    cell_height = thumb_height + 2 * _FRAME + _LABEL_SIZE + 2 * _GAP
    width = max(columns * cell_width + _GAP, MIN_WIDTH)
    lines = [part for line in lines for part in _wrapped(_ascii(line), title_font, width - 2 * _GAP)]
    top = len(lines) * (_TITLE_SIZE + 6) + (2 * _GAP if lines else _GAP)

    sheet = Image.new("RGB", (width, top + math.ceil(len(shown) / columns) * cell_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((_GAP, _GAP + row * (_TITLE_SIZE + 6)), line, fill=_INK, font=title_font)
    for place, (i, picture) in enumerate(zip(shown, pictures)):
        left, upper = _GAP + place % columns * cell_width, top + place // columns * cell_height
        if colours[i] != _INK:
            corner = (left + thumb_width + 2 * _FRAME - 1, upper + thumb_height + 2 * _FRAME - 1)
            draw.rectangle((left, upper, *corner), fill=colours[i])
        small = picture.resize((thumb_width, thumb_height), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + _FRAME, upper + _FRAME))
        label = (left + _FRAME, upper + thumb_height + 2 * _FRAME + 2)
        draw.text(label, _time(float(timestamps[i])), fill=colours[i], font=label_font)
    return sheet


def _columns(count: int, aspect: float) -> int:
    """Columns of ``count`` thumbnails of width / height ``aspect`` for a sheet of about 3:2."""
    return min(max(round(math.sqrt(1.5 * count / aspect)), 1), MAX_COLUMNS)


def _time(seconds: float) -> str:
    """12.34 s, 3:07.50, 1:02:03.40."""
    if round(seconds * 100) < 6000:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds * 100), 6000)
    hours, minutes = divmod(minutes, 60)
    clock = f"{rest // 100:02d}.{rest % 100:02d}"
    return f"{hours}:{minutes:02d}:{clock}" if hours else f"{minutes}:{clock}"


def _ascii(line: str) -> str:
    """The line in letters that the font has: é as e, × as x, … as ..., and ? for what has no such spelling."""
    plain = unicodedata.normalize("NFKD", line.replace("\u00d7", "x").replace("·", "*"))
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).encode("ascii", "replace").decode()


def _wrapped(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> Iterable[str]:
    """The line in parts that fit, broken at spaces, and within words that are too long by themselves (paths)."""
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
