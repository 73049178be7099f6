"""Published weights of Depth Anything and Video Depth Anything: round trips, settings of the files, licenses."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import DepthAnythingForDepthEstimation

from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
from blueberry_video.models.depth_anything.convert import (
    convert_published_video,
    license_text,
    settings_of_transformers,
    to_published,
    to_published_video,
)
from blueberry_video.models.dinov2 import DINOv2

IMAGES = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
SIZES = {"taps": (0, 1, 2, 4), "features": 16, "out_channels": (4, 6, 16, 16)}
TEMPORAL = {"norm_groups": 4, "temporal_heads": 2, "scan_head_dim": 4, "scan_state_dim": 8, "scan_conv_size": 2}


def encoder(offset: float | None = 0.0, swiglu: bool = False, width: int = 12) -> DINOv2:
    made = DINOv2(28, 1, 14, width, 5, 2, table_size=4, interpolate_offset=offset, swiglu=swiglu)
    nn.init.normal_(made.pos_embed)  # large, otherwise their interpolation hardly matters
    return made


def shown(model):
    """Model with maps that vary and are not clamped to 0."""
    head = model.depth_head if isinstance(model, DepthAnything) else model.head
    nn.init.normal_(head.scratch.output_conv2[2].weight, std=0.5)
    nn.init.constant_(head.scratch.output_conv2[2].bias, 1.0)
    for module in getattr(head, "motion_modules", ()):
        nn.init.normal_(module.temporal_transformer.proj_out.weight, std=0.5)
    return model.eval()


def image_model(max_depth: float | None = None, seed: int = 0, **options) -> DepthAnything:
    torch.manual_seed(seed)
    return shown(DepthAnything(encoder(**options), **SIZES, max_depth=max_depth))


def video_model(temporal: str = "attention", seed: int = 0, max_depth: float | None = None) -> VideoDepthAnything:
    torch.manual_seed(seed)
    return shown(VideoDepthAnything(encoder(None), **SIZES, max_depth=max_depth, temporal=temporal, **TEMPORAL))


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_depth", [None, 80.0])
@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_loads_the_saved_folder(max_depth: float | None, swiglu: bool, tmp_path: Path):
    model = image_model(max_depth, swiglu=swiglu)
    model.save_published(tmp_path / "folder")
    peer, report = DepthAnythingForDepthEstimation.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected, found = peer.eval()(IMAGES).predicted_depth, model(IMAGES)
    assert found.std() > 1e-3
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("max_depth", [None, 20.0])
def test_a_folder_of_transformers_is_a_round_trip(max_depth: float | None, tmp_path: Path, capsys):
    model = image_model(max_depth)
    model.save_published(tmp_path / "ours")
    peer = DepthAnythingForDepthEstimation.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again = DepthAnything.from_published(tmp_path / name).eval()
        assert (again.taps, again.max_depth) == (model.taps, model.max_depth)
        torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=1e-6, atol=1e-6)
        assert "check the model card" in capsys.readouterr().out


def test_an_original_file_is_a_round_trip(tmp_path: Path, capsys):
    model = image_model(offset=None)
    model.save_published(tmp_path / "weights.pth")
    state = torch.load(tmp_path / "weights.pth")
    assert state["pretrained.patch_embed.proj.weight"].shape == (12, 3, 14, 14)
    assert state["pretrained.mask_token"].shape == (1, 12)
    known = {"taps": SIZES["taps"], "num_heads": 2, "max_depth": None}
    again = DepthAnything.from_published(tmp_path / "weights.pth", **known).eval()
    assert again.pretrained.offset == 0.1
    assert torch.equal(again(IMAGES), model(IMAGES))
    for key, message in (
        ("taps", r"pass taps=…"),
        ("num_heads", r"num_heads=…"),
        ("max_depth", r"pass max_depth=None"),
    ):
        with pytest.raises(ValueError, match=rf"weights\.pth.*{message}"):
            DepthAnything.from_published(
                tmp_path / "weights.pth", **{name: value for name, value in known.items() if name != key}
            )


def test_settings_without_a_counterpart_in_transformers_raise(tmp_path: Path):
    with pytest.raises(ValueError, match=r"interpolate_offset=0\.1\b.*\b0\.0\b"):
        image_model(offset=None).save_published(tmp_path / "none")
    for value in (float("inf"), 20.5):  # an integer there
        with pytest.raises(ValueError, match=rf"max_depth={value}\b"):
            image_model(value).save_published(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for model in (image_model(), video_model()):
        with pytest.raises(FileExistsError, match="full"):
            model.save_published(tmp_path / "full")


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("depth_anything_v2_metric_hypersim_vits.pth", 20.0),
        ("depth_anything_v2_metric_vkitti_vitl.pth", 80.0),
        ("my_metric_vkitti_model.pth", 80.0),
        ("metric_video_depth_anything_vits.pth", float("inf")),
        ("depth_anything_v2_vitb.pth", None),
        ("video_depth_anything_vits.pth", None),
        ("depth_anything_vitl14.pth", None),
        ("weights.pth", "unknown"),
        ("folder_20", 20.0),
        ("folder_none", None),
        ("run_20", 20.0),
        ("run_none", None),
    ],
)
@pytest.mark.parametrize("ours", [None, 20.0, 80.0, float("inf")])
def test_metric_weights_in_a_relative_model_and_the_reverse_raise(name: str, theirs, ours, tmp_path: Path):
    source = tmp_path / name
    if name.startswith("folder"):
        image_model(theirs).save_published(source)
    elif name.startswith("run"):
        (source / "checkpoints").mkdir(parents=True)
        config = {"model": {"taps": list(SIZES["taps"]), "max_depth": theirs, "encoder": {"num_heads": 2}}}
        (source / "config.yaml").write_text(yaml.safe_dump(config))
        source = source / "checkpoints" / "last.ckpt"
        torch.save({"state_dict": {f"model.{k}": v for k, v in image_model().state_dict().items()}}, source)
    else:
        image_model().save_published(source)
    model = image_model(ours, seed=1)
    model.taps = (1, 2, 3, 4) if "14" in name else model.taps
    if theirs in (ours, "unknown"):
        assert str(source) in model.load_published(source)
        assert torch.equal(model.depth_head.projects[0].weight, image_model().depth_head.projects[0].weight)
        return
    with pytest.raises(ValueError, match=rf"max_depth={ours}\b.*max_depth={theirs}\b.*encoder_only=True"):
        model.load_published(source)
    before = model.depth_head.projects[0].weight.clone()
    assert "license" in model.load_published(source, encoder_only=True)
    assert torch.equal(model.depth_head.projects[0].weight, before)
    assert torch.equal(model.pretrained.cls_token, image_model().pretrained.cls_token)


def test_taps_of_configs_of_transformers():
    """Stages are counted from 1, or, if negative, from the end; older configs have only names."""
    for stages in ({"out_indices": [9, 10, 11, 12]}, {"out_indices": [-4, -3, -2, -1]}):
        assert settings_of_transformers({"backbone_config": stages})["taps"] == (8, 9, 10, 11)
    names = {"out_features": ["stage5", "stage12", "stage18", "stage24"], "num_hidden_layers": 24}
    assert settings_of_transformers({"backbone_config": names})["taps"] == (4, 11, 17, 23)


def test_an_incomplete_head_raises(tmp_path: Path):
    state = to_published(image_model().state_dict(), huggingface=False)
    del state["depth_head.projects.2.weight"]
    torch.save(state, tmp_path / "weights.pth")
    for load in (DepthAnything.from_published, VideoDepthAnything.from_published):
        with pytest.raises(ValueError, match=r"weights\.pth.*projects\.2\.weight"):
            load(tmp_path / "weights.pth", num_heads=2, max_depth=None)


def test_other_taps_or_heads_raise(tmp_path: Path):
    image_model().save_published(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"taps=\[1, 2, 3, 4\].*\[0, 1, 2, 4\]"):
        DepthAnything.from_published(tmp_path / "folder", taps=(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"num_heads=3 contradicts num_attention_heads=2"):
        DepthAnything.from_published(tmp_path / "folder", num_heads=3)
    image_model().save_published(tmp_path / "depth_anything_vits14.pth")  # V1: the last four blocks
    with pytest.raises(ValueError, match=r"taps=\[0, 1, 2, 4\].*\[1, 2, 3, 4\]"):
        image_model().load_published(tmp_path / "depth_anything_vits14.pth")


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporal", ["attention", "scan", "none"])
@pytest.mark.parametrize("max_depth", [None, float("inf")])
def test_a_folder_of_a_video_model_is_a_round_trip(temporal: str, max_depth: float | None, tmp_path: Path):
    model, video = video_model(temporal, max_depth=max_depth), IMAGES[None].transpose(1, 2)
    model.save_published(tmp_path / "folder")
    again = VideoDepthAnything.from_published(tmp_path / "folder").eval()
    assert (again.temporal, again.max_depth, again.taps) == (temporal, max_depth, model.taps)
    assert torch.equal(again(video), model(video))
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        VideoDepthAnything.from_published(tmp_path / "folder")


def test_an_original_file_of_a_video_model_is_a_round_trip(tmp_path: Path, capsys):
    model, video = video_model(), IMAGES[None].transpose(1, 2)
    file = tmp_path / "weights.pth"
    model.save_published(file)
    options = {key: TEMPORAL[key] for key in ("norm_groups", "temporal_heads")}
    again = VideoDepthAnything.from_published(file, taps=SIZES["taps"], num_heads=2, max_depth=None, **options).eval()
    assert torch.equal(again(video), model(video))
    state = torch.load(file)
    table = state["head.motion_modules.2.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe"]
    assert table.shape == (1, 32, 16)
    assert (table[0, 3, 2], table[0, 3, 3]) == (
        pytest.approx(torch.tensor(3 * 10000 ** (-2 / 16)).sin().item(), abs=1e-5),
        pytest.approx(torch.tensor(3 * 10000 ** (-2 / 16)).cos().item(), abs=1e-5),
    )
    for name in [name for name in state if name.endswith("pos_encoder.pe")]:
        state[name] = state[name].flip(1)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"pos_encoder\.pe in .*weights\.pth.*\(1, 32, 16\)"):
        model.load_published(file)


def test_published_names_of_video_depth_anything_large():
    """519 tensors: 343 of the encoder and 176 of the head, 28 in each temporal module."""
    with torch.device("meta"):
        large = DINOv2(518, 1, 14, 1024, 24, 16)
        model = VideoDepthAnything(large, (4, 11, 17, 23), 256, (256, 512, 1024, 1024))
    with torch.device("meta"):
        state = to_published_video(model.state_dict())
    assert sum(name.startswith("pretrained.") for name in state) == 343
    assert sum(name.startswith("head.") for name in state) == 176
    assert sum(name.startswith("head.motion_modules.3.temporal_transformer.") for name in state) == 28
    assert len(state) == 519


@pytest.mark.parametrize("temporal", ["attention", "scan", "none"])
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_an_image_checkpoint_is_loaded_into_a_video_model(temporal: str, layout: str, tmp_path: Path):
    image = image_model()
    source = tmp_path / ("weights.pth" if layout == "original" else "folder")
    image.save_published(source)
    torch.manual_seed(1)
    model = VideoDepthAnything(encoder(0.0), **SIZES, temporal=temporal, **TEMPORAL).eval()
    text = model.load_published(source)
    assert ("temporal modules" in text) == (temporal != "none")
    assert "license" in text
    video = IMAGES[None].transpose(1, 2)
    torch.testing.assert_close(model(video)[0], image(IMAGES), rtol=1e-6, atol=1e-6)


def test_temporal_modules_of_another_kind_raise(tmp_path: Path):
    video_model("attention").save_published(tmp_path / "folder")
    for temporal in ("scan", "none"):
        with pytest.raises(ValueError, match=rf"temporal={temporal}\b.*temporal=attention\b"):
            video_model(temporal).load_published(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"norm_groups=2\b.*norm_groups=4\b"):
        VideoDepthAnything.from_published(tmp_path / "folder", norm_groups=2)
    with pytest.raises(ValueError, match=r"video_depth_anything\.pth.*VideoDepthAnything"):
        image_model().load_published(tmp_path / "folder" / "video_depth_anything.pth")
    with pytest.raises(ValueError, match=r"max_depth=20\.0\b.*max_depth=None\b"):
        video_model(max_depth=20.0).load_published(tmp_path / "folder")


def test_half_precision_files_are_accepted(tmp_path: Path):
    state = {name: value.half().contiguous() for name, value in to_published_video(video_model().state_dict()).items()}
    save_file(state, tmp_path / "half.safetensors")
    assert convert_published_video(state, "a test").keys() == video_model().state_dict().keys()
    video_model(seed=1).load_published(tmp_path / "half.safetensors")


# ---- licenses --------------------------------------------------------------------------------------------------------

V1, V2 = (8, 9, 10, 11), (2, 5, 8, 11)


@pytest.mark.parametrize(
    ("width", "taps", "video", "expected"),
    [
        (384, V2, False, "Apache-2.0"),
        (768, V2, False, "CC-BY-NC-4.0"),
        (768, V1, False, "Apache-2.0"),
        (384, V2, True, "Apache-2.0"),
        (768, V2, True, "CC-BY-NC-4.0"),
        (512, V2, True, "check the model card"),
    ],
)
def test_licenses(width: int, taps: tuple[int, ...], video: bool, expected: str):
    assert expected in license_text(width, taps, 12, video)
    assert sum(terms in license_text(width, taps, 12, video) for terms in ("Apache", "CC-BY", "model card")) == 1
    assert "CC-BY-NC-4.0" in license_text(1536, (9, 19, 29, 39), 40)


def test_the_license_is_returned_by_load_and_printed_by_from_published(tmp_path: Path, capsys):
    torch.manual_seed(0)
    model = DepthAnything(DINOv2(28, 1, 14, 768, 12, 12, table_size=2, mlp_ratio=0.1), V2, 8, (4, 4, 4, 4))
    model.save_published(tmp_path / "depth_anything_v2_vitb.pth")
    assert "CC-BY-NC-4.0" in model.load_published(tmp_path / "depth_anything_v2_vitb.pth")
    again = DepthAnything.from_published(tmp_path / "depth_anything_v2_vitb.pth")
    assert (again.taps, again.max_depth, again.pretrained.num_heads) == (V2, None, 12)
    assert "CC-BY-NC-4.0" in capsys.readouterr().out
