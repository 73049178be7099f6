"""Masked autoencoder: sizes, initialization, cost and errors of files; parity is in test_videomae_parity and
test_masked_references.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae import modeling_videomae

from blueberry_video.config import CONF
from blueberry_video.masking import DualMasking, TubeMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder, decoder_flops
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import decayed_names

# encoder width, depth, heads; decoder width, depth, heads; parameters
PUBLISHED = {
    "S": (384, 12, 6, 192, 4, 3, 24_029_376),
    "B": (768, 12, 12, 384, 4, 6, 94_210_944),
    "L": (1024, 24, 16, 512, 12, 8, 342_996_992),
    "H": (1280, 32, 16, 640, 12, 8, 692_487_296),
}


def tiny(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=2, num_heads=2)
    return MaskedAutoencoder(encoder, **{"decoder_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2, **changes})


def parameter_count(width: int, depth: int, decoder_width: int, decoder_depth: int) -> int:
    def blocks(d: int, count: int) -> int:
        attention = 3 * d * d + 2 * d + d * d + d  # queries, keys, values; two biases; projection
        mlp = d * 4 * d + 4 * d + 4 * d * d + d
        return count * (attention + mlp + 2 * 2 * d)

    patch = 3 * 2 * 16 * 16
    encoder = patch * width + width + blocks(width, depth) + 2 * width
    decoder = blocks(decoder_width, decoder_depth) + 2 * decoder_width + decoder_width * patch + patch
    return encoder + width * decoder_width + decoder_width + decoder


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size, monkeypatch):
    width, depth, heads, decoder_width, decoder_depth, decoder_heads, expected = PUBLISHED[size]
    # transformers fills its position tables, which are no parameters, in a slow loop
    monkeypatch.setattr(modeling_videomae, "get_sinusoid_encoding_table", lambda n, d: torch.zeros(1, n, d))
    with torch.device("meta"):
        encoder = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads)
        ours = MaskedAutoencoder(encoder, decoder_width, decoder_depth, decoder_heads)
        config = VideoMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=4 * decoder_width,
            use_mean_pooling=False,
        )
        theirs = VideoMAEForPreTraining(config)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts == [expected, expected]
    assert parameter_count(width, depth, decoder_width, decoder_depth) == expected


# width, depth, heads, patch size and MLP width of the encoder; width, depth, heads and MLP width of the decoder; pixels
# of a patch
VIDEOMAE_V2 = {
    "small": (384, 12, 6, 16, 1536, 192, 4, 3, 768, 1536),
    "base": (768, 12, 12, 16, 3072, 384, 4, 6, 1536, 1536),
    "large": (1024, 24, 16, 16, 4096, 512, 4, 8, 2048, 1536),
    "huge": (1280, 32, 16, 16, 5120, 512, 4, 8, 2048, 1536),
    "giant": (1408, 40, 16, 14, 6144, 512, 4, 8, 2234, 1176),
}
OMNIMAE = {
    "base": (768, 12, 12, 16, 3072, 384, 4, 16, 1536, 1536),
    "large": (1024, 24, 16, 16, 4096, 512, 4, 16, 2048, 1536),
    "huge": (1280, 32, 16, 14, 5120, 512, 8, 16, 2048, 1176),
}


def from_conf(name: str) -> MaskedAutoencoder:
    """Model of a config in conf/model/, on the meta device."""
    file = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    encoder = OmegaConf.load(CONF / "model" / f"{file.pop('defaults')[0]['/model@encoder']}.yaml")
    with torch.device("meta"):
        return instantiate(OmegaConf.merge({"encoder": encoder}, file))


def block_count(width: int, hidden: int, bias: str) -> int:
    qkv = {"none": 0, "qv": 2 * width, "qkv": 3 * width}[bias]
    return 4 * width * width + qkv + width + 2 * width * hidden + hidden + width + 4 * width


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(f"videomae_v2/{size}", sizes) for size, sizes in VIDEOMAE_V2.items()]
    + [(f"omnimae/{size}", sizes) for size, sizes in OMNIMAE.items()],
)
def test_the_configs_of_v2_and_omnimae_have_the_published_sizes(name, sizes):
    width, depth, heads, patch, hidden, decoder_width, decoder_depth, decoder_heads, decoder_hidden, pixels = sizes
    model, is_omnimae = from_conf(name), name.startswith("omnimae")
    assert model.encoder.patch_size == (2, patch, patch)
    assert model.encoder.video_size == (3, 16, 224, 224)
    assert model.encoder.images == model.mask_before_projection == is_omnimae
    assert {block.attn.num_heads for block in model.encoder.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder.blocks} == {decoder_heads}
    assert model.decoder.head.out_features == pixels
    encoder = pixels * width + width + 2 * width + depth * block_count(width, hidden, "qkv" if is_omnimae else "qv")
    between = width * decoder_width + (decoder_width + width if is_omnimae else decoder_width)  # and the mask token
    blocks = decoder_depth * block_count(decoder_width, decoder_hidden, "none" if is_omnimae else "qv")
    decoder = blocks + 2 * decoder_width + decoder_width * pixels + pixels
    assert sum(parameter.numel() for parameter in model.parameters()) == encoder + between + decoder


# VideoMAE's decoder predicts all hidden tokens, that of V2 half of all tokens
@pytest.mark.parametrize(
    ("name", "visible", "targets"),
    [
        ("videomae_v2/base", 160, 784),
        ("videomae_v2/base", 160, 1408),
        ("videomae_v2/giant", 208, 1024),
        ("omnimae/base", 157, 1411),
    ],
)
def test_decoder_flops_equal_the_formula(name, visible, targets):
    """A multiply-add counts as two; attention adds 4 N² D to the matrix products."""
    model, n = from_conf(name), visible + targets
    width, dim = model.encoder.embed_dim, model.decoder.norm.normalized_shape[0]
    hidden = model.decoder.blocks[0].mlp.fc1.out_features
    blocks = len(model.decoder.blocks) * (8 * n * dim * dim + 4 * n * n * dim + 4 * n * dim * hidden)
    projected = n if model.mask_before_projection else visible
    head = 2 * targets * dim * model.decoder.head.out_features
    assert decoder_flops(model, visible, targets) == blocks + head + 2 * projected * width * dim


def test_dual_masking_halves_the_decoder_flops_of_the_base_model():
    model = from_conf("videomae_v2/base")
    masks = DualMasking()(1, (8, 14, 14))
    flops = [decoder_flops(model, masks.keep.shape[1], n) for n in (masks.target.shape[1], 1568 - 160)]
    assert flops == [19_857_408_000, 39_057_358_848]


def test_base_encodes_160_tokens_and_predicts_1408():
    with torch.device("meta"):
        model = MaskedAutoencoder(VisionTransformer(depth=1), decoder_depth=1)
    masks = TubeMasking(0.9)(2, model.encoder.grid((2, 3, 16, 224, 224)))
    video = torch.empty(2, 3, 16, 224, 224, device="meta")
    keep, target, _ = masks.to(torch.device("meta"))
    assert model.encoder(video, keep).shape == (2, 160, 768)
    assert model(video, keep, target).shape == (2, 1408, 1536)


@pytest.mark.parametrize("qkv_bias", ["qv", "qkv", "none"])
def test_every_parameter_receives_a_gradient(qkv_bias):
    model = tiny(qkv_bias=qkv_bias)
    keep, target = torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2, 4, 6, 7]])
    model(torch.randn(1, 3, 4, 16, 16), keep, target).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_those_of_the_original():
    model = tiny(decoder_dim=64, decoder_num_heads=4)
    assert model.mask_token.abs().max() <= 0.02  # truncated at one standard deviation
    assert 0.008 < model.mask_token.std() < 0.015
    assert 0.97 / 4 < model.encoder_to_decoder.weight.abs().max() <= 1 / 4  # torch's default: 1 / sqrt(fan in of 16)
    assert model.encoder_to_decoder.bias is None
    bound = (6 / (64 + 384)) ** 0.5  # Xavier
    assert 0.98 * bound < model.decoder.head.weight.abs().max() <= bound
    assert not model.decoder.head.bias.any()


def test_initial_weights_with_mask_before_projection_are_those_of_omnimae():
    model = tiny(decoder_dim=64, decoder_num_heads=4, mask_before_projection=True)
    assert model.mask_token.shape == (1, 1, 16)
    assert not model.mask_token.any()
    bound = (6 / (64 + 16)) ** 0.5  # Xavier
    assert 0.97 * bound < model.encoder_to_decoder.weight.abs().max() <= bound
    assert not model.encoder_to_decoder.bias.any()
    assert model.decoder.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.decoder.head.bias.any()
    torch.testing.assert_close(model.decoder_positions, model.encoder.positions)


def save(path, **changes):
    state = tiny().state_dict()
    state.update({name: value for name, value in changes.items() if value is not None})
    torch.save({"model": {name: v for name, v in state.items() if changes.get(name, True) is not None}}, path)
    return path


def load(path) -> MaskedAutoencoder:
    return MaskedAutoencoder.from_published(path, num_frames=4, image_size=16, num_heads=2, decoder_num_heads=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder.blocks.0.attn.proj.bias": None}, r"missing.*decoder\.blocks\.0\.attn\.proj\.bias"),
        ({"encoder.blocks.1.norm2.bias": None}, r"missing.*blocks\.1\.norm2\.bias"),
        ({"mask_token": None}, "missing.*mask_token"),
        ({"decoder.pos_embed": torch.ones(1)}, r"unexpected.*decoder\.pos_embed"),
        ({"encoder.pos_embed": torch.ones(1)}, r"shape.*pos_embed \(1,\)"),
        ({"decoder.head.bias": torch.ones(7)}, r"(mismatch|shape).*decoder\.head\.bias"),
    ],
)
def test_weights_that_do_not_fit_raise_with_their_name(changes, text, tmp_path):
    with pytest.raises(ValueError, match=f"(?si){text}"):
        load(save(tmp_path / "wrong.pth", **changes))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("videomae.encoder.layer.0.attention.output.dense.bias", r"missing.*blocks\.0\.attn\.proj\.bias"),
        ("decoder.decoder_layers.0.intermediate.dense.bias", r"missing.*decoder\.blocks\.0\.mlp\.fc1\.bias"),
        (
            "decoder.decoder_layers.0.attention.attention.key.weight",
            r"(mismatch|shape).*decoder\.blocks\.0\.attn\.qkv\.weight",
        ),
        ("videomae.embeddings.patch_embeddings.projection.bias", r"missing.*patch_embed\.proj\.bias"),
        ("+videomae.embeddings.position_embeddings", r"unexpected.*embeddings\.position_embeddings"),
        ("+videomae.encoder.layer.0.layer_scale", r"unexpected.*blocks\.0\.layer_scale"),
        ("+decoder.extra", r"unexpected.*decoder\.extra"),
    ],
)
def test_transformers_weights_that_do_not_fit_are_named(change, text, tmp_path):
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_hidden_size=12,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    )
    state = VideoMAEForPreTraining(config).state_dict()
    if change.startswith("+"):
        state[change[1:]] = torch.ones(1)
    else:
        del state[change]
    torch.save(state, tmp_path / "wrong.bin")
    with pytest.raises(ValueError, match=f"(?si){text}"):
        load(tmp_path / "wrong.bin")


def test_file_without_decoder_raises_with_the_alternatives(tmp_path):
    torch.save(tiny().encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"(?s)encoder\.pth.*encoder_to_decoder\.weight.*classifier.*init_from"):
        load(tmp_path / "encoder.pth")


def test_the_mask_token_decays_only_as_in_omnimae():
    assert "mask_token" not in decayed_names(tiny())
    assert decayed_names(tiny(decay_mask_token=True)) == decayed_names(tiny()) | {"mask_token"}
    for size, decays in (("tiny", False), ("base", True), ("large", True), ("huge", True)):
        config = OmegaConf.load(CONF / "model" / "omnimae" / f"{size}.yaml")
        assert config.decay_mask_token is decays
