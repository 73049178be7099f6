"""Encoders from published weights and runs: features of random models of transformers and of original files, from
folders, files and a hub; weights of other architectures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

from blueberry_video import load_encoder
from blueberry_video.data.write import write_video
from blueberry_video.models import dinov2, vit
from blueberry_video.models.cogvideox import CogVideoX
from blueberry_video.models.jepa import JEPA, convert
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.models.masked_autoencoder import convert as masked
from blueberry_video.models.vit import VisionTransformer
from loopback_hub import commit_of, loopback_hub
from trained_classifier import trained

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
EXACT = {"rtol": 0, "atol": 1e-6}


def videomae_config(**settings: object) -> VideoMAEConfig:
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 96, "decoder_num_attention_heads": 2}
    sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 64}
    return VideoMAEConfig(**(sizes | settings))


def vjepa2_config() -> VJEPA2Config:
    sizes = {"crop_size": 16, "patch_size": 8, "frames_per_clip": 4, "tubelet_size": 2, "hidden_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "pred_hidden_size": 24, "pred_num_attention_heads": 2}
    return VJEPA2Config(**sizes, pred_num_hidden_layers=1, pred_num_mask_tokens=2, num_pooler_layers=1)


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def saved(model, folder: Path, processor: bool = True) -> Path:
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(file, np.random.default_rng(0).integers(0, 255, (12, 24, 40, 3), dtype=np.uint8), 10.0)
    return file


def pixels(encoder, video: Path, mean=MEAN, std=STD) -> torch.Tensor:
    """Input of transformers (1, T, 3, H, W), normalized."""
    clip = encoder.read(video)[0].pixels.float() / 255
    return ((clip - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


@pytest.mark.parametrize("kind", [VideoMAEModel, VideoMAEForPreTraining, VideoMAEForVideoClassification])
@pytest.mark.parametrize(
    "settings", [{}, {"layer_norm_eps": 1e-6, "use_mean_pooling": False, "qkv_bias": False}], ids=str
)
def test_features_of_a_videomae_folder_are_those_of_transformers(tmp_path, video, kind, settings):
    model = randomized(kind(videomae_config(**settings)))
    encoder = load_encoder(saved(model, tmp_path), device="cpu")
    assert (encoder.encoder.num_heads, encoder.clips.num_frames, encoder.clips.height) == (4, 4, 16)
    with torch.no_grad():
        inner = model if kind is VideoMAEModel else model.videomae
        expected = inner(pixels(encoder, video)).last_hidden_state
    torch.testing.assert_close(encoder.features(video), expected, **EXACT)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", [VJEPA2Model, VJEPA2ForVideoClassification])
def test_features_of_a_vjepa2_folder_are_those_of_transformers(tmp_path, video, kind):
    model = randomized(kind(vjepa2_config()))
    encoder = load_encoder(saved(model, tmp_path), device="cpu")
    with torch.no_grad():
        inner = model if kind is VJEPA2Model else model.vjepa2
        expected = inner(pixels(encoder, video), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder.features(video), expected, **EXACT)


def test_features_of_image_models_are_those_of_transformers_frame_by_frame(tmp_path, video):
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 28, "patch_size": 14}
    model = randomized(Dinov2Model(Dinov2Config(**sizes)))
    encoder = load_encoder(saved(model, tmp_path / "dinov2"), num_frames=3, image_size=28, device="cpu")
    with torch.no_grad():
        expected = model(pixels(encoder, video)[0]).last_hidden_state[:, 1:].reshape(1, 12, 48)
    torch.testing.assert_close(encoder.features(video), expected, **EXACT)
    backbone = Dinov2Config(**sizes, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 48, "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 8}
    depth = randomized(
        DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **sizes, head_hidden_size=32))
    )
    encoder = load_encoder(saved(depth, tmp_path / "depth"), num_frames=3, image_size=28, device="cpu")
    with torch.no_grad():
        hidden = depth.backbone(pixels(encoder, video)[0]).feature_maps[-1]
    torch.testing.assert_close(encoder.features(video), hidden[:, 1:].reshape(1, 12, 48), **EXACT)


def test_features_from_a_hub_are_those_of_the_folder(tmp_path, video, monkeypatch):
    root = tmp_path / "repositories"
    videomae, vjepa2 = randomized(VideoMAEModel(videomae_config())), randomized(VJEPA2Model(vjepa2_config()))
    saved(videomae, root / "videomae")
    saved(vjepa2, root / "vjepa2")
    saved(llama(), root / "llama")
    with loopback_hub(root, tmp_path / "cache", monkeypatch) as hub:
        for weights, folder in (("org/videomae", "videomae"), ("hf://org/vjepa2@v1", "vjepa2")):
            found = load_encoder(weights, device="cpu")
            expected = load_encoder(root / folder, device="cpu")
            assert torch.equal(found.features(video), expected.features(video))
            assert found.clips == expected.clips
            assert found.origin == f"{weights} ({commit_of(folder)})"
        named = load_encoder("hf://org/videomae/model.safetensors", device="cpu")
        assert named.encoder.num_heads == 4
        with pytest.raises(ValueError, match=r"org/llama holds LlamaForCausalLM.*llama"):
            load_encoder("org/llama")
        assert not [request for request in hub.requests if "org/llama" in request and request.endswith("safetensors")]


@pytest.mark.parametrize("layout", ["videomae", "finetuned", "omnimae", "vjepa", "dinov2"])
def test_original_files_need_the_number_of_heads(tmp_path, video, layout):
    torch.manual_seed(0)
    kind = {"qkv_bias": "qkv", "images": True} if layout == "omnimae" else {"qkv_bias": "qv"}
    if layout == "vjepa":
        kind = {"qkv_bias": "qkv", "positions": "sincos_3d"}
    encoder = VisionTransformer(32, 4, 16, 2, 48, 2, 3, **kind)
    if layout == "dinov2":
        encoder = dinov2.DINOv2(28, 4, 14, 48, 2, 3, table_size=2)
        state = dinov2.to_original(encoder.state_dict())
    elif layout == "vjepa":
        model = randomized(JEPA(encoder, 24, 1, 3, predictor_positions="sincos_3d"))
        encoder, state = model.target_encoder, convert.to_original(model.state_dict(), (2, 2, 2))
    elif layout == "finetuned":
        encoder = VisionTransformer(32, 4, 16, 2, 48, 2, 3, final_norm=False)
        state = {"model": vit.convert_original(encoder.state_dict()) | {"head.weight": torch.ones(2, 48)}}
    else:
        model = MaskedAutoencoder(encoder, 32, 1, 2, mask_before_projection=layout == "omnimae")
        state = model.state_dict()
        state = masked.to_omnimae(state, 4, 32) if layout == "omnimae" else {"model": masked.to_original(state)}
    torch.save(state, tmp_path / "weights.pth")
    sizes = {"num_frames": 4, "image_size": 28 if layout == "dinov2" else 32, "device": "cpu"}
    with pytest.raises(ValueError, match=r"weights\.pth has attention layers of width=48.*num_heads=…"):
        load_encoder(tmp_path / "weights.pth", **sizes)
    loaded = load_encoder(tmp_path / "weights.pth", 3, **sizes)
    clip = pixels(loaded, video, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded.features(video), encoder.eval()(clip), **EXACT)


def test_a_run_is_an_encoder(tmp_path):
    run = trained(tmp_path)
    file = tmp_path / "videos" / "val" / "dark" / "1.mp4"
    model = load_encoder(run, device="cpu")
    batch = model.batch(model.read(file), ["a"])
    with torch.no_grad():
        expected = model.task.model.encoder(model.task.normalize(batch["video"]))
    assert torch.equal(model.features(file), expected)
    assert model.patches(16, 16) == (2, 2)
    with pytest.raises(ValueError, match=r"num_heads=3 out"):
        load_encoder(run, num_heads=3)
    [checkpoint] = list((run / "checkpoints").glob("step_*.ckpt"))
    with pytest.raises(ValueError, match=rf"checkpoint of a run.*{run.name}"):
        load_encoder(checkpoint)


def test_other_weights_are_refused_by_name(tmp_path):
    saved(llama(), tmp_path / "llama")
    with pytest.raises(ValueError, match=r"llama holds LlamaForCausalLM \(config\.json: llama\), not an encoder"):
        load_encoder(tmp_path / "llama")
    transformer = CogVideoX(num_heads=2, head_dim=8, depth=1, text_dim=8, time_dim=8)
    transformer.save_published(tmp_path / "cogvideox")
    with pytest.raises(ValueError, match=r"cogvideox holds CogVideoXTransformer3DModel"):
        load_encoder(tmp_path / "cogvideox")
    save_file(transformer.state_dict(), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file\.safetensors holds CogVideoX, not an encoder"):
        load_encoder(tmp_path / "file.safetensors")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "HunyuanVideoPipeline"}')
    with pytest.raises(ValueError, match=r"pipeline holds HunyuanVideoPipeline"):
        load_encoder(tmp_path / "pipeline")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        load_encoder(tmp_path / "nowhere")
    config = json.loads((saved(VideoMAEModel(videomae_config()), tmp_path / "v") / "config.json").read_text())
    with pytest.raises(ValueError, match=r"num_heads=2 contradicts num_attention_heads=4"):
        load_encoder(tmp_path / "v", num_heads=2)
    (tmp_path / "v" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match=r"hidden_act='relu'"):
        load_encoder(tmp_path / "v")
