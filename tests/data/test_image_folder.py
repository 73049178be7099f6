"""Image folders in both layouts, with invalid rows and broken files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.image_folder import ImageFolder


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (24, 16)) -> Path:
    """Writes an image of one colour with ``size`` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def listed(root: Path, count: int = 4, rows: list[dict] | None = None) -> Path:
    """Writes images of red 40 · k and their metadata."""
    for k in range(count):
        picture(root / "images" / f"{k}.png", (40 * k, 0, 0))
    made = [{"file_name": f"images/{k}.png", "caption": f"picture {k}", "label": "ba"[k % 2]} for k in range(count)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (made if rows is None else rows)))
    return root


def by_class(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """Writes <root>/<split>/<class>/<number>.jpg."""
    for split, classes in splits.items():
        for name, count in classes.items():
            for k in range(count):
                picture(root / split / name / f"{k}.jpg")
    return root


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path):
    images = ImageFolder(listed(tmp_path), image_size=8)
    item = images[3]
    assert set(item) == {"video", "id", "caption", "labels"}
    assert (len(images), item["id"], item["caption"], item["labels"]) == (4, "3.png", "picture 3", {"label": 0})
    assert item["video"].dtype == torch.uint8
    assert item["video"].shape == (1, 3, 8, 8)
    assert item["video"].amax((0, 2, 3)).tolist() == item["video"].amin((0, 2, 3)).tolist() == [120, 0, 0]
    assert images.classes == {"label": ("a", "b")}
    assert images.reversal_pairs == {}
    assert next(iter(DataLoader(images, batch_size=4)))["labels"]["label"].tolist() == [1, 0, 1, 0]
    with pytest.raises(IndexError, match=r"index 4\b.*\b4 "):
        images[4]


@pytest.mark.parametrize("form", ["csv", "image", "none"])
def test_metadata_formats(tmp_path: Path, form: str):
    listed(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    picture(tmp_path / "images" / "more" / "2.JPEG")
    names = ["0.png", "1.png", "more/2.JPEG"]
    if form == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,labels.kind,split\n" + "".join(f"{n},x,val\n" for n in names))
        images = ImageFolder(tmp_path, 8, split="val")
        assert images[2]["labels"] == {"kind": 0}
    elif form == "image":
        (tmp_path / "metadata.json").write_text(json.dumps([{"image": name} for name in names]))
        images = ImageFolder(tmp_path, 8)
    else:
        images = ImageFolder(tmp_path, 8, metadata="none")
    assert [item["id"] for item in DataLoader(images, batch_size=None)] == names


def test_class_folders_with_and_without_split(tmp_path: Path):
    by_class(tmp_path, {"train": {"cat": 2, "ant": 1}, "val": {"cat": 1, "bee": 1}})
    (tmp_path / "notes" / "drafts").mkdir(parents=True)  # not a class: no images
    train, val = (ImageFolder(tmp_path, 8, split=split) for split in ("train", "val"))
    assert train.classes == val.classes == {"class": ("ant", "bee", "cat")}  # over all splits
    assert [train[i]["id"] for i in range(3)] == ["ant/0.jpg", "cat/0.jpg", "cat/1.jpg"]
    assert [train[i]["labels"]["class"] for i in range(3)] == [0, 2, 2]
    assert [val[i]["labels"]["class"] for i in range(2)] == [1, 2]
    bare = ImageFolder(tmp_path / "train", 8)
    assert bare.classes == {"class": ("ant", "cat")}
    assert ImageFolder(tmp_path, 8, split="val", classes={"class": ["cat", "bee", "ant"]})[0]["labels"] == {"class": 1}
    (tmp_path / "classes.json").write_text('{"classes": {"class": ["cat", "ant"]}}')
    with pytest.raises(ValueError, match=r"label class\b.*'bee'.*\bcat, ant\b"):
        ImageFolder(tmp_path, 8, split="val")


def test_numeric_classes_are_sorted_by_value(tmp_path: Path):
    by_class(tmp_path, {"train": {"10": 1, "9": 1}})
    assert ImageFolder(tmp_path, 8, split="train").classes == {"class": ("9", "10")}


def test_images_are_rotated_and_converted_to_rgb(tmp_path: Path):
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, 16:] = 255  # white on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise
    (tmp_path / "images").mkdir()
    Image.fromarray(half).save(tmp_path / "images" / "turned.jpg", exif=exif, quality=100)
    Image.new("L", (8, 8), 77).save(tmp_path / "images" / "grey.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "images" / "print.jpg", quality=100)
    Image.new("RGBA", (8, 8), (10, 20, 30, 51)).save(tmp_path / "images" / "clear.webp", lossless=True, exact=True)
    images = ImageFolder(tmp_path, None, metadata="none")
    clear, grey, red, turned = (images[i]["video"] for i in range(4))
    assert turned.shape == (1, 3, 32, 16)
    assert turned[0, :, 20:].min() > 200 > 50 > turned[0, :, :12].max()  # white below
    assert grey.unique().tolist() == [77]
    assert clear[0, :, 0, 0].tolist() == [206, 208, 210]  # 20 % of the color over white
    assert red[0, 0].min() > 200 > 60 > red[0, 1:].max()


def test_crop_and_stretch(tmp_path: Path):
    stripes = np.zeros((32, 64, 3), np.uint8)
    stripes[:, 16:48] = 255  # the center square is white
    (tmp_path / "images").mkdir()
    Image.fromarray(stripes).save(tmp_path / "images" / "a.png")
    assert ImageFolder(tmp_path, 16, metadata="none")[0]["video"].min() > 200
    stretched = ImageFolder(tmp_path, (16, 32), metadata="none", resize="stretch")[0]["video"]
    assert stretched.shape == (1, 3, 16, 32)
    assert stretched[..., 0].max() < 20 < 230 < stretched[..., 15].min()


def test_without_antialias_pictures_are_plain_bilinear(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    plain, smooth = (ImageFolder(tmp_path, 16, metadata="none", antialias=choice) for choice in (False, True))
    cut = torch.from_numpy(noise[1::3, 1::3][:, 8:24]).permute(2, 0, 1).float()  # the centers of 3 x 3 pixels
    assert (plain[0]["video"][0].float() - cut).abs().max() <= 1
    assert (smooth[0]["video"][0].float() - cut).abs().mean() > 10
    assert plain.cache_key != smooth.cache_key


def test_broken_files_are_replaced_and_listed(tmp_path: Path):
    listed(tmp_path, 5)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    whole = (tmp_path / "images" / "3.png").read_bytes()
    (tmp_path / "images" / "3.png").write_bytes(whole[: len(whole) // 2])  # truncated
    listing = tmp_path / "run" / "skipped.csv"
    images = ImageFolder(tmp_path, 8, max_broken_share=0.4, skipped_file=str(listing))
    for _ in range(2):  # the second time they are in skipped
        assert [images[i]["id"] for i in range(5)] == ["0.png", "2.png", "2.png", "4.png", "4.png"]
    with listing.open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["1.png", "3.png"]
    with pytest.raises(RuntimeError, match=r"\b1 of 5\b.*max_broken_share=0\.1"):
        ImageFolder(tmp_path, 8, max_broken_share=0.1)[1]
    for k in range(5):
        (tmp_path / "images" / f"{k}.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"\b5 image files"):
        ImageFolder(tmp_path, 8, max_broken_share=1.0)[0]


def test_vanished_files_count_as_broken(tmp_path: Path):
    images = ImageFolder(listed(tmp_path, 5), 8, max_broken_share=0.2)
    cached = CachedClips(images, tmp_path / "cache", shard_size=2)
    key = cached.cache_key
    assert cached[0]["id"] == "0.png"
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "2.png").unlink()
    assert images[2]["id"] == "3.png"
    assert "2.png" in images.skipped
    assert [cached[i]["id"] for i in range(5)] == ["0.png", "1.png", "3.png", "3.png", "4.png"]
    assert cached.cache_key == key
    with pytest.raises(RuntimeError, match=r"\b2 of 5\b.*max_broken_share=0\.2"):
        images[0]


def test_cache_key_depends_on_settings_and_files(tmp_path: Path):
    images = ImageFolder(listed(tmp_path), 8)
    cached = CachedClips(images, tmp_path / "cache")
    assert torch.equal(cached[2]["video"], images[2]["video"])
    keys = {images.cache_key, ImageFolder(tmp_path, 16).cache_key, ImageFolder(tmp_path, 8, resize="stretch").cache_key}
    picture(tmp_path / "images" / "0.png", (9, 9, 9), (30, 30))
    assert len(keys | {ImageFolder(tmp_path, 8).cache_key}) == 4


def test_missing_folders_and_files_raise(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"\bimages/.*\.bmp, \.jpeg, \.jpg.*split\b"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"/images\b.*\broot\b"):
        ImageFolder(tmp_path, 8, metadata="metadata.csv")
    by_class(tmp_path, {"train": {"cat": 1}})
    with pytest.raises(FileNotFoundError, match=r"split\b.*\(train\)"):
        ImageFolder(tmp_path, 8)  # split forgotten
    with pytest.raises(FileNotFoundError, match=r"/test\b.*split\b"):
        ImageFolder(tmp_path, 8, split="test")
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/images\b.*\.bmp, \.jpeg, \.jpg.*root\b"):
        ImageFolder(tmp_path, 8)
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl.*metadata\.json.*metadata\.csv.*metadata=none"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize(
    ("rows", "error", "expected"),
    [
        ([{"file_name": "0.png"}], ValueError, r"'1\.png'.*metadata\.jsonl"),
        ([{"image": f"{k}.png"} for k in range(3)], FileNotFoundError, r"metadata\.jsonl.*'2\.png'.*/images\b"),
        ([{"video": "0.png"}], ValueError, r"line 1\b.*'video'.*file_name"),
        ([{"file_name": "../0.png"}], ValueError, r"line 1\b.*file_name='\.\./0\.png'.*images/"),
    ],
)
def test_invalid_rows_raise(tmp_path: Path, rows: list, error: type[Exception], expected: str):
    listed(tmp_path, 2, rows)
    with pytest.raises(error, match=expected):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"image_size": 0}, "image_size=0 "),
        ({"resize": "pad"}, r"resize='pad' .*'crop'.*'stretch'"),
        ({"max_broken_share": 2}, r"max_broken_share=2 .*0 to 1"),
        ({"split": "val"}, "split='val' "),
    ],
)
def test_invalid_arguments_raise(tmp_path: Path, arguments: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        ImageFolder(listed(tmp_path), **{"image_size": 8, **arguments})
