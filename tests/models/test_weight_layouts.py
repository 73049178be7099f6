"""Round trips of weights between this package, the originals and transformers, and errors."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from blueberry_video.models import vit
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.masked_autoencoder import convert
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.positions import sinusoid_table
from blueberry_video.weights.diffusers_folder import write_folder


def model(mask_before_projection: bool = False, **changes) -> MaskedAutoencoder:
    """Masked autoencoder with random parameters."""
    kind = {"qkv_bias": "qkv", "images": True} if mask_before_projection else {"qkv_bias": "qv"}
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=2, num_heads=2, **{**kind, **changes})
    options = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 16 if mask_before_projection else 4}
    built = MaskedAutoencoder(
        encoder,
        **options,
        qkv_bias="none" if mask_before_projection else "qv",
        mask_before_projection=mask_before_projection,
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return built.eval()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


OMNIMAE_NAMES = {
    *(f"trunk.{name}" for name in ("pos_embed", "mask_token", "patch_embed.proj.1.weight", "patch_embed.proj.1.bias")),
    *(f"trunk.norm.{kind}" for kind in ("weight", "bias")),
    *(
        f"trunk.blocks.{index}.{name}.{kind}"
        for index in range(2)
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
    "trunk.decoder.pos_embed",
    *(f"trunk.decoder.{name}.{kind}" for name in ("decoder_embed", "norm") for kind in ("weight", "bias")),
    "trunk.decoder.decoder_blocks.0.attn.qkv.weight",
    *(
        f"trunk.decoder.decoder_blocks.0.{name}.{kind}"
        for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
    "head.weight",
    "head.bias",
}


def test_transformers_computes_the_same_from_converted_weights(tmp_path):
    ours = model()
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        use_mean_pooling=False,
        layer_norm_eps=1e-6,
    )
    theirs = VideoMAEForPreTraining(config).eval()
    theirs.decoder.norm.eps = 1e-6
    theirs.load_state_dict(convert.to_huggingface(ours.state_dict()), strict=True)
    video, keep, target = torch.randn(1, 3, 4, 16, 16), torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2, 4, 6, 7]])
    with torch.no_grad():
        logits = theirs(video.transpose(1, 2), bool_masked_pos=masked(target)).logits
        torch.testing.assert_close(logits, ours(video, keep, target), atol=1e-4, rtol=1e-4)  # outputs are around 10


@pytest.mark.parametrize("source", ["original", "huggingface"])
def test_videomae_round_trips(source):
    state = model().state_dict()
    out = getattr(convert, f"to_{source}")(state)
    assert_equal(getattr(convert, f"convert_{source}")(out), state)


def test_omnimae_round_trips_under_its_original_names():
    state = model(mask_before_projection=True).state_dict()
    out = convert.to_omnimae(state, num_frames=4, image_size=16)
    assert out.keys() == OMNIMAE_NAMES
    assert out["trunk.mask_token"].shape == (1, 16)
    for name in ("trunk.pos_embed", "trunk.decoder.pos_embed"):
        assert torch.equal(out[name], sinusoid_table(8, 16)[None])
    assert_equal(convert.convert_omnimae(out), state)


def test_omnimae_position_table_has_the_length_of_its_clips():
    state = model(mask_before_projection=True).encoder.state_dict()
    assert vit.to_omnimae(state, num_frames=16, image_size=32)["trunk.pos_embed"].shape == (1, 8 * 4 * 4, 16)


@pytest.mark.parametrize(
    ("layout", "mask_before_projection"),
    [("ours", False), ("original", False), ("huggingface", False), ("ours", True), ("omnimae", True)],
)
@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_every_written_layout_loads_the_same_model(layout, mask_before_projection, file, tmp_path):
    ours = model(mask_before_projection)
    state = ours.state_dict()
    if layout != "ours":
        options = {"num_frames": 4, "image_size": 16} if layout == "omnimae" else {}
        state = getattr(convert, f"to_{layout}")(state, **options)
    if file.endswith("pth"):
        torch.save({"module": {f"module.{name}": value for name, value in state.items()}}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)  # refuses tensors that share memory
    heads = None if mask_before_projection else 4  # OmniMAE decoders have 16 at every width
    again = MaskedAutoencoder.from_published(tmp_path / file, 4, 16, num_heads=2, decoder_num_heads=heads)
    assert again.encoder.images == mask_before_projection
    video, keep, target = torch.randn(1, 3, 4, 16, 16), torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2, 4]])
    assert torch.equal(again(video, keep, target), ours(video, keep, target))
    encoder = VisionTransformer(16, 4, 8, 2, 16, 2, 2, qkv_bias="qkv" if mask_before_projection else "qv").eval()
    encoder.load_published(tmp_path / file)
    assert torch.equal(encoder(video), ours.encoder(video))


VIDEO, KEEP, TARGET = torch.randn(1, 3, 4, 16, 16), torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2, 4, 6, 7]])


@pytest.mark.parametrize("shard_size", [10**9, 4_000])
@pytest.mark.parametrize("qkv_bias", ["qv", "none"])
@torch.no_grad()
def test_saved_folder_loads_here_and_in_transformers(qkv_bias, shard_size, tmp_path, monkeypatch):
    monkeypatch.setattr(write_folder, "__defaults__", (shard_size,))
    encoder = VisionTransformer(16, 4, 8, 2, 16, 2, 2, 3.0, qkv_bias=qkv_bias, final_norm=qkv_bias == "qv")
    ours = MaskedAutoencoder(encoder, 32, 1, 4, mlp_ratio=2.0, qkv_bias=qkv_bias).eval()
    for parameter in ours.parameters():
        parameter.normal_()
    ours.save_published(tmp_path / "saved")
    assert (len(list((tmp_path / "saved").glob("model*.safetensors"))) > 1) == (shard_size == 4_000)

    again = MaskedAutoencoder.from_published(tmp_path / "saved").eval()
    assert again.config() == ours.config()
    assert torch.equal(again(VIDEO, KEEP, TARGET), ours(VIDEO, KEEP, TARGET))
    assert MaskedAutoencoder.from_published(tmp_path / "saved", num_frames=8).encoder.num_tokens == 16

    theirs, found = VideoMAEForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    theirs.eval().decoder.norm.eps = 1e-6
    logits = theirs(VIDEO.transpose(1, 2), bool_masked_pos=masked(TARGET)).logits
    torch.testing.assert_close(logits, ours(VIDEO, KEEP, TARGET), atol=1e-4, rtol=1e-4)  # outputs are around 10

    theirs.save_pretrained(tmp_path / "theirs")
    back = MaskedAutoencoder.from_published(tmp_path / "theirs")
    assert_equal(back.state_dict(), ours.state_dict())
    back.load_state_dict({name: torch.zeros_like(value) for name, value in back.state_dict().items()})
    assert str(tmp_path / "theirs") in back.load_published(tmp_path / "theirs")
    assert_equal(back.state_dict(), ours.state_dict())
    encoder.load_published(tmp_path / "theirs")


def masked(target: Tensor, tokens: int = 8) -> Tensor:
    return torch.zeros(len(target), tokens, dtype=torch.bool).scatter(1, target, True)


def test_number_of_heads_that_differs_from_the_folder_raises(tmp_path):
    model().save_published(tmp_path)
    changed = MaskedAutoencoder(VisionTransformer(16, 4, 8, 2, 16, 2, 2), 32, 1, decoder_num_heads=2)
    with pytest.raises(ValueError, match=r"\bdecoder_num_attention_heads=4 \(here 2\)"):
        changed.load_published(tmp_path)
    encoder = VisionTransformer(16, 4, 8, 2, 16, 2, num_heads=4)
    for network in (encoder, MaskedAutoencoder(encoder, 32, 1, 4)):
        with pytest.raises(ValueError, match=r"\bnum_attention_heads=2 \(here 4\)"):
            network.load_published(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"image_size": [16, 32]}, r"image_size=\[16, 32\]"), ({"hidden_act": "relu"}, r"hidden_act='relu'.*'gelu'")],
)
def test_unsupported_settings_in_a_config_raise(changes, expected, tmp_path):
    model().save_published(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=expected):
        MaskedAutoencoder.from_published(tmp_path)


def test_settings_without_a_counterpart_in_videomae_raise(tmp_path):
    def build(encoder: dict, **options) -> MaskedAutoencoder:
        return MaskedAutoencoder(VisionTransformer(16, 4, 8, 2, 24, 1, 2, **encoder), 24, 1, 2, **options)

    wrong = {
        "model.mask_before_projection=True": model(mask_before_projection=True),
        "model.encoder.images=True": build({"images": True}),
        "model.encoder.positions='rope_3d'": build({"positions": "rope_3d"}),
        "model.encoder.qkv_bias='qkv'": build({"qkv_bias": "qkv"}),
        "model.qkv_bias='none'": build({}, qkv_bias="none"),
        "model.in_channels=1": build({}, in_channels=1),
        "model.encoder='DINOv2'": MaskedAutoencoder(DINOv2(8, 2, 4, 24, 1, 2, table_size=2), 24, 1, 2),
    }
    for key, network in wrong.items():
        with pytest.raises(ValueError, match=rf"{re.escape(key)}.*VideoMAE"):
            network.save_published(tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_head_of_omnimae_training_code_converts():
    state = model(mask_before_projection=True).state_dict()
    out = convert.to_omnimae(state, 4, 16)
    out = {name.replace("head.", "head.projector."): value for name, value in out.items()}
    assert "head.projector.weight" in out
    assert_equal(convert.convert_omnimae(out), state)


@pytest.mark.parametrize("name", ["trunk.pos_embed", "trunk.decoder.pos_embed"])
def test_position_tables_other_than_the_sinusoid_raise(name, tmp_path):
    good = convert.to_omnimae(model(mask_before_projection=True).state_dict(), 4, 16)
    for wrong in (good[name] + 1e-4, good[name].flip(1), good[name][0], torch.randn(1, 9, 16)):
        torch.save({**good, name: wrong}, tmp_path / "wrong.torch")
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{re.escape(str(tuple(wrong.shape)))}"):
            MaskedAutoencoder.from_published(tmp_path / "wrong.torch", 4, 16, num_heads=2)
    torch.save({**good, name: good[name] + 1e-7}, tmp_path / "rounded.torch")
    MaskedAutoencoder.from_published(tmp_path / "rounded.torch", 4, 16, num_heads=2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("trunk.decoder.decoder_embed.bias", r"missing.*encoder_to_decoder\.bias"),
        ("trunk.mask_token", "missing.*mask_token"),
        ("trunk.blocks.1.attn.qkv.bias", r"missing.*blocks\.1\.attn\.qkv\.bias"),
        ("trunk.decoder.decoder_blocks.0.norm1.bias", r"missing.*decoder\.blocks\.0\.norm1\.bias"),
        ("head.bias", r"missing.*decoder\.head\.bias"),
        ("+trunk.cls_token", "unexpected.*cls_token"),
        ("+trunk.decoder.extra", r"unexpected.*decoder\.extra"),
    ],
)
def test_omnimae_weights_that_do_not_fit_raise_with_their_name(change, text, tmp_path):
    state = convert.to_omnimae(model(mask_before_projection=True).state_dict(), 4, 16)
    if change.startswith("+"):
        state[change[1:]] = torch.ones(1)
    else:
        del state[change]
    torch.save(state, tmp_path / "wrong.torch")
    with pytest.raises(ValueError, match=f"(?si){text}"):
        MaskedAutoencoder.from_published(tmp_path / "wrong.torch", 4, 16, 2, 4)


def test_finetuned_omnimae_without_decoder_raises_with_the_alternatives(tmp_path):
    state = convert.to_omnimae(model(mask_before_projection=True).state_dict(), 4, 16)
    torch.save({name: v for name, v in state.items() if "decoder" not in name}, tmp_path / "finetuned.torch")
    with pytest.raises(ValueError, match=r"(?s)finetuned\.torch.*trunk\.decoder\.decoder_embed.*classifier.*init_from"):
        MaskedAutoencoder.from_published(tmp_path / "finetuned.torch", 4, 16, 2)
    encoder = VisionTransformer(16, 4, 8, 2, 16, 2, 2, qkv_bias="qkv", final_norm=False)
    assert "norm.weight" in encoder.load_published(tmp_path / "finetuned.torch")


def test_weights_without_an_equivalent_in_a_layout_raise():
    omni, videomae = model(mask_before_projection=True).state_dict(), model().state_dict()
    for to in (convert.to_original, convert.to_huggingface):
        with pytest.raises(ValueError, match=r"OmniMAE.*encoder_to_decoder\.bias.*VideoMAE.*to_omnimae"):
            to(omni)
        with pytest.raises(ValueError, match=r"OmniMAE.*VideoMAE.*to_omnimae"):
            to(model(qkv_bias="qkv").state_dict())
    with pytest.raises(ValueError, match=r"encoder_to_decoder\.bias.*OmniMAE.*mask_before_projection=true"):
        convert.to_omnimae(videomae)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.bias.*OmniMAE.*qkv_bias='qkv'"):
        convert.to_omnimae(model(mask_before_projection=True, qkv_bias="none").state_dict())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.bias.*VideoMAE.*qkv_bias='qkv'"):
        vit.to_huggingface(model(mask_before_projection=True).encoder.state_dict())


def test_giant_variant_is_inferred_from_its_shapes():
    """1408 channels in 16 heads of 88, an MLP of 48 / 11, patches of 14; the decoder's MLP is 2234 wide."""
    with torch.device("meta"):
        encoder = VisionTransformer(28, 2, 14, 2, embed_dim=1408, depth=1, num_heads=16, mlp_ratio=48 / 11)
        giant = MaskedAutoencoder(encoder, 512, 1, 8, mlp_ratio=48 / 11)
        again = vit.VisionTransformer.from_weights(
            vit.convert_original(giant.state_dict()), "source", 16, num_frames=2, image_size=28
        )
    assert again.blocks[0].attn.num_heads == 16
    assert again.blocks[0].mlp.fc1.out_features == 6144
    assert again.patch_size == (2, 14, 14)
    assert giant.decoder.blocks[0].mlp.fc1.out_features == 2234
