"""Conditioning of a network on a batch: images, padding, mismatched captions, captions of a dataset."""

import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from blueberry_video.diffusion.conditioning import (
    captions_of,
    check_image,
    different_captions,
    draw_image_mask,
    drop_captions,
    encoded_images,
    first_frames,
    latents_of,
    mismatched_text,
    pad_to_patches,
    takes_image,
    with_first_frame,
)
from blueberry_video.diffusion.generation import generate, generate_latents
from blueberry_video.diffusion.guidance import ConstantGuidance, EmbeddedGuidance, NoGuidance
from blueberry_video.diffusion.image_noise import ImageNoise
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import DDIM, DPMSolverSDE
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.autoencoder.base import Autoencoder, Pixels, sample
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.models.text_encoder.words import WordText


def cogvideox(**changes) -> TextToVideo:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 4, "num_frames": 4, "height": 8, "width": 8}
    torch.manual_seed(0)
    transformer = CogVideoX(**{**sizes, "positions": "rope", "zero_init": False, **changes})
    return TextToVideo(transformer.eval(), WordText(8, 8, ["disc"]), Pixels())


def hunyuan(**changes) -> TextToVideo:
    sizes = {"patch_size": (1, 4, 4), "num_heads": 2, "head_dim": 16, "depth": 1, "single_depth": 1, "text_dim": 8}
    sizes |= {"in_channels": 3, "out_channels": 3, "refiner_depth": 1, "pooled_dim": 0, "rope_axes": (4, 6, 6)}
    torch.manual_seed(0)
    transformer = HunyuanVideo(**{**sizes, "zero_init": False, **changes})
    return TextToVideo(transformer.eval(), WordText(8, 8, ["disc"]), Pixels())


def hunyuan15(**changes) -> TextToVideo:
    sizes = {"in_channels": 7, "out_channels": 3, "patch_size": (1, 4, 4), "num_heads": 2, "head_dim": 16, "depth": 1}
    sizes |= {"refiner_depth": 1, "text_dim": 8, "letters_dim": 8, "image_dim": 8, "rope_axes": (4, 6, 6)}
    torch.manual_seed(0)
    return TextToVideo(HunyuanVideo15(**{**sizes, **changes}).eval(), WordText(8, 8, ["disc"]), Pixels())


FAMILIES = {
    "channels": lambda: cogvideox(in_channels=6),
    "latent_concat": lambda: hunyuan(in_channels=7, image_condition="latent_concat"),
    "token_replace": lambda: hunyuan(image_condition="token_replace"),
    "optional": hunyuan15,
}


class Cubes(Autoencoder):
    """Invertible autoencoder with cubed pixels as latents that records the videos it encodes."""

    first_frame_alone = True

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(1, 1, 1))
        self.encoded: list[torch.Tensor] = []

    def encode(self, video):
        self.encoded.append(video)
        return torch.cat([video**3, torch.full_like(video, -torch.inf)], dim=1)

    def decode(self, latents):
        return latents.sign() * latents.abs() ** (1 / 3)


NOISY, IMAGE = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 1, 8, 8)


def test_with_first_frame_follows_the_conditioning_of_each_family():
    channels = cogvideox(in_channels=6)
    concat = hunyuan(in_channels=7, image_condition="latent_concat")
    replaced = hunyuan(image_condition="token_replace")
    conditioned = with_first_frame(channels, NOISY, IMAGE)
    assert torch.equal(conditioned[:, :3], NOISY)
    assert torch.equal(conditioned[:, 3:, :1], IMAGE)
    assert conditioned[:, 3:, 1:].abs().sum() == 0
    conditioned = with_first_frame(concat, NOISY, IMAGE)
    assert conditioned.shape[1] == 7
    assert conditioned[:, 6].mean(dim=(0, 2, 3)).tolist() == [1, 0, 0, 0]
    conditioned = with_first_frame(replaced, NOISY, IMAGE)
    assert torch.equal(conditioned[:, :, :1], IMAGE)
    assert torch.equal(conditioned[:, :, 1:], NOISY[:, :, 1:])
    assert cogvideox().shape.image_condition is None


@pytest.mark.parametrize(("changes", "image"), [({}, IMAGE), ({"in_channels": 6}, None)])
def test_unexpected_or_missing_image_raises(changes: dict, image: torch.Tensor | None):
    with pytest.raises(ValueError, match=r"CogVideoX.*in_channels=\d\b.*image"):
        with_first_frame(cogvideox(**changes), NOISY, image)


@pytest.mark.parametrize("changes", [{"in_channels": 6}, {"in_channels": 7, "image_condition": "latent_concat"}])
def test_sample_depends_on_the_image(changes: dict):
    network = hunyuan(**changes) if "image_condition" in changes else cogvideox(**changes)
    text = network.text(["disc", "disc"])
    samples = [
        generate_latents(network, text, None, NOISY, DDIM(2), NoGuidance(), FlowMatching(), image)
        for image in (IMAGE, -IMAGE)
    ]
    assert samples[0].shape == NOISY.shape
    assert not torch.allclose(samples[0], samples[1])


def test_image_is_the_first_frame_of_a_batch():
    batch = {"video": torch.rand(2, 3, 4, 8, 8), "id": ["a", "b"]}
    latents, image = latents_of(cogvideox(in_channels=6), batch, None)
    torch.testing.assert_close(image, latents[:, :, :1])
    assert latents_of(cogvideox(), batch, None)[1] is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropped_image_and_its_mask_are_zeros(kind: str):
    network = FAMILIES[kind]()
    assert network.shape.image_condition == kind
    conditioned = with_first_frame(network, NOISY, IMAGE, torch.tensor([True, False]))
    assert torch.equal(conditioned[:1], with_first_frame(network, NOISY[:1], IMAGE[:1]))
    if kind == "token_replace":
        assert not conditioned[1, :, 0].any()
        assert torch.equal(conditioned[1, :, 1:], NOISY[1, :, 1:])
    else:
        assert torch.equal(conditioned[1, :3], NOISY[1])
        assert not conditioned[1, 3:].any()
    if kind == "optional":
        assert torch.equal(conditioned[1:], with_first_frame(network, NOISY[1:], None))


@pytest.mark.parametrize(("kind", "share"), {"channels": 0.05, "latent_concat": 0, "token_replace": 0}.items())
def test_published_dropout_of_images(kind: str, share: float):
    assert FAMILIES[kind]().shape.image_dropout == share
    assert takes_image(FAMILIES[kind](), 1.0)


def test_optional_image_is_used_only_with_dropout_below_one_and_several_frames():
    network, clips = hunyuan15(), {"video": torch.rand(2, 3, 4, 8, 8), "id": ["a", "b"]}
    assert network.shape.image_dropout == 0.7
    assert hunyuan15(causal_chunk=2).shape.image_dropout == 1
    assert cogvideox().shape.image_dropout == 0
    assert latents_of(network, clips, None, dropout=0.7)[1] is not None
    assert latents_of(network, clips, None, dropout=1)[1] is None
    still = {**clips, "video": clips["video"][:, :, :1]}
    assert latents_of(network, still, None, dropout=0.7)[1] is None, "the image would be the whole clip"


def test_dropout_of_images_has_its_probability():
    torch.manual_seed(0)
    shown = draw_image_mask(torch.zeros(2000, 1, 1, 1, 1), 0.7)
    assert abs(shown.float().mean() - 0.3) < 0.04
    assert draw_image_mask(IMAGE, 0.0) is None
    assert draw_image_mask(None, 0.5) is None
    assert not draw_image_mask(IMAGE, 1.0).any()


def test_image_noise_is_added_to_the_pixels_of_the_image_only():
    autoencoder = Cubes()
    network = TextToVideo(cogvideox(in_channels=6).transformer, WordText(8, 8, ["disc"]), autoencoder)
    batch = {"video": torch.rand(2, 3, 4, 8, 8), "id": ["a", "b"]}
    torch.manual_seed(3)
    latents, image = latents_of(network, batch, None, ImageNoise(mean=-3.0, std=0.0))
    pixels = batch["video"] * 2 - 1
    torch.testing.assert_close(latents, pixels**3)
    assert autoencoder.encoded[1].shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(image, autoencoder.encoded[1] ** 3)
    added = (autoencoder.encoded[1] - pixels[:, :, :1]).flatten(1).std(dim=1)
    assert ((added > 0.04) & (added < 0.06)).all(), "exp(-3) of pixels in [-1, 1]"
    latents_of(network, batch, None)
    assert len(autoencoder.encoded) == 3, "without noise the image is the first frame of the encoded clip"


def test_image_noise_without_pixels_raises():
    moments = Pixels().encode(NOISY)
    with pytest.raises(ValueError, match=r"task\.image_noise=null"):
        latents_of(cogvideox(in_channels=6), {"moments": moments, "id": ["a", "b"]}, None, ImageNoise())
    assert latents_of(cogvideox(), {"moments": moments, "id": ["a", "b"]}, None, ImageNoise())[1] is None


@pytest.mark.parametrize(
    ("network", "frames", "message"),
    [
        (lambda: hunyuan15(causal_chunk=2), 4, r"causal_chunk=0\b.*task\.image_dropout=1\b"),
        (FAMILIES["token_replace"], 1, r"image_condition=token_replace\b.*clips"),
    ],
)
def test_networks_and_clips_incompatible_with_an_image_raise(network, frames: int, message: str):
    with pytest.raises(ValueError, match=message):
        check_image(network(), frames, {}, None)


def test_channels_that_match_no_image_conditioning_raise():
    with pytest.raises(ValueError, match=r"in_channels=5\b.*out_channels=3\b.*\b3\b.*\b6\b"):
        cogvideox(in_channels=5)


def test_first_frames_come_from_pixels_or_from_stored_latents():
    autoencoder = Cubes()
    network = TextToVideo(cogvideox(in_channels=6).transformer, WordText(8, 8, ["disc"]), autoencoder)
    video = torch.rand(2, 3, 4, 8, 8)
    images = first_frames(network, {"video": video})
    torch.testing.assert_close(images, video[:, :, :1] * 2 - 1)
    moments = autoencoder.encode(video * 2 - 1)
    torch.testing.assert_close(first_frames(network, {"video": moments, "moments": moments}), images)
    torch.testing.assert_close(encoded_images(network, images), images**3)


@pytest.mark.parametrize("shape", [(2, 3, 2, 8, 8), (2, 3, 8, 8), (2, 1, 1, 8, 8)])
def test_invalid_image_shapes_raise(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*autoencoder=Pixels\b.*\(B, 3, 1, H, W\)"):
        encoded_images(cogvideox(in_channels=6), torch.zeros(shape))


def test_frames_are_padded_at_the_front_and_removed_after_sampling():
    latents = torch.randn(1, 3, 5, 8, 8)
    filled = pad_to_patches(latents, 2)
    assert torch.equal(filled[:, :, 1:], latents)
    assert torch.equal(filled[:, :, 0], latents[:, :, 0])
    assert pad_to_patches(latents[:, :, 1:], 2).shape[2] == 4
    network = cogvideox(tubelet_size=2, num_frames=6)
    inputs: list[torch.Tensor] = []
    network.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    text, settings = network.text(["disc"]), (DDIM(2), NoGuidance(), FlowMatching(), None)
    sample = generate_latents(network, text, None, latents, *settings, torch.Generator().manual_seed(3))
    assert sample.shape == latents.shape
    assert torch.equal(inputs[0][:, :, 1:], latents)
    expected = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(inputs[0][:, :, :1], expected), "new noise, not a copy of the next frame"


def test_guidance_incompatible_with_the_network_raises():
    network = cogvideox()
    with pytest.raises(ValueError, match=r"EmbeddedGuidance.*embedded_guidance=False"):
        generate_latents(network, network.text(["disc"]), None, NOISY[:1], DDIM(2), EmbeddedGuidance(), FlowMatching())
    network = hunyuan(embedded_guidance=True)
    text = network.text(["disc"])
    with pytest.raises(ValueError, match=r"ConstantGuidance.*embedded_guidance=True.*EmbeddedGuidance"):
        generate_latents(network, text, text, NOISY[:1], DDIM(2), ConstantGuidance(), FlowMatching())
    weak, strong = (
        generate_latents(network, text, None, NOISY[:1], DDIM(2), EmbeddedGuidance(scale), FlowMatching())
        for scale in (1.0, 6.0)
    )
    assert not torch.allclose(weak, strong)


def numbered(size: int) -> TextTokens:
    numbers = torch.arange(float(size))
    return TextTokens(numbers.view(size, 1, 1), torch.ones(size, 1, dtype=torch.bool), numbers.view(size, 1))


@pytest.mark.parametrize(
    ("captions", "indices"), [("abc", [2, 0, 1]), ("aab", [2, 2, 1]), ("baaa", [3, 0, 0, 0]), ("abab", [3, 0, 1, 2])]
)
def test_every_clip_gets_a_different_caption(captions: str, indices: list[int]):
    mismatched = mismatched_text(cogvideox(), {"caption": list(captions)}, numbered(len(captions)), [])
    assert mismatched.tokens.flatten().tolist() == mismatched.pooled.flatten().tolist() == indices


def test_equal_captions_are_replaced_from_the_dataset():
    network, text = cogvideox(), numbered(2)
    network.text.set_vocabulary(("disc", "square"))
    batch = {"caption": ["disc", "disc"]}
    assert mismatched_text(network, batch, text, []) is None
    spare = different_captions([{"caption": "disc"}, {"caption": "disc"}, {"caption": "square"}])
    for caption, other in (("disc", "square"), ("square", "disc")):
        mismatched = mismatched_text(network, {"caption": [caption] * 2}, text, spare)
        assert torch.equal(mismatched.tokens, network.text([other] * 2).tokens)
        assert torch.equal(mismatched.mask, network.text([other] * 2).mask)
    assert different_captions([{"caption": "disc"}, {"caption": "disc"}]) == []


def test_stored_captions_come_with_their_embeddings():
    class Stored(list):
        made_of: ClassVar[dict] = {}

        def captions(self):
            return iter(["square", "disc", "disc"])  # buckets have a different order than the clips

    mask = torch.ones(1, dtype=torch.bool)
    clips = Stored(
        {"id": str(n), "caption": caption, "text_tokens": torch.full((1, 1), float(n)), "text_mask": mask}
        for n, caption in enumerate(["disc", "disc", "square"])
    )
    network = TextToVideo(cogvideox().transformer)
    for caption, number in (("disc", 2.0), ("square", 0.0)):
        mismatched = mismatched_text(network, {"caption": [caption] * 3}, numbered(3), different_captions(clips))
        assert mismatched.tokens.flatten().tolist() == [number] * 3
        assert mismatched.mask.shape == (3, 1)
        assert mismatched.pooled is None


def test_captions_of_rows_method_or_clips():
    rows = SimpleNamespace(rows=[SimpleNamespace(caption="one"), SimpleNamespace(caption=None)])
    assert list(captions_of(rows)) == ["one", ""]
    assert list(captions_of(SimpleNamespace(captions=lambda: iter(["two"])))) == ["two"]
    assert list(captions_of([{"caption": "three"}, {}])) == ["three", ""]


def test_model_without_autoencoder_accepts_only_stored_latents():
    network = TextToVideo(cogvideox().transformer)
    with pytest.raises(ValueError, match=r"model\.autoencoder\b.*data=latents"):
        latents_of(network, {"video": torch.rand(2, 3, 4, 8, 8), "id": ["a", "b"]}, None)
    moments = Pixels().encode(NOISY)
    latents, _ = latents_of(network, {"moments": moments, "id": ["a", "b"]}, None)
    torch.testing.assert_close(latents, NOISY)


# ---- the image is encoded separately from the clip -------------------------------------------------------------------


class Spanning(Autoencoder):
    """Autoencoder with a norm over all frames of a clip, as in published autoencoders."""

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(1, 1, 1))

    def encode(self, video):
        return torch.cat([video - video.mean(dim=(2, 3, 4), keepdim=True), torch.full_like(video, -torch.inf)], dim=1)

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("kind", FAMILIES)
def test_image_is_encoded_separately(kind: str):
    network = TextToVideo(FAMILIES[kind]().transformer, WordText(8, 8, ["disc"]), Spanning())
    batch = {"video": torch.rand(2, 3, 4, 8, 8), "id": ["a", "b"]}
    _, image = latents_of(network, batch, None)
    pixels = batch["video"][:, :, :1] * 2 - 1
    torch.testing.assert_close(image, encoded_images(network, pixels))
    torch.testing.assert_close(image, pixels - pixels.mean(dim=(2, 3, 4), keepdim=True))
    assert image.std() > 0.3, "images with different latents"
    moments = network.autoencoder.encode(batch["video"] * 2 - 1)
    stored = {"moments": moments, "video": moments, "id": batch["id"]}
    with pytest.raises(ValueError, match=r"(?s)image_moments.*make latents EXP="):
        latents_of(network, stored, None)
    stored["image_moments"] = network.autoencoder.encode(batch["video"][:, :, :1] * 2 - 1)
    for model in (network, TextToVideo(network.transformer)):
        latents, of_stored = latents_of(model, stored, None)
        torch.testing.assert_close(of_stored, image)
        torch.testing.assert_close(latents, moments[:, :3])
    torch.testing.assert_close(first_frames(network, stored), image)


@pytest.mark.parametrize("autoencoder", [Pixels(), CausalVideoVAE(4, (4, 8, 8), time_stride=2)])
def test_first_frame_alone_autoencoders_encode_the_first_frame_independently(autoencoder: Autoencoder):
    assert autoencoder.first_frame_alone
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    torch.testing.assert_close(
        autoencoder.encode(video)[:, :, :1], autoencoder.encode(video[:, :, :1]), atol=1e-5, rtol=0
    )


# ---- random numbers and devices --------------------------------------------------------------------------------------


def test_without_dropout_captions_are_returned_unchanged():
    network = cogvideox()
    text = network.text(["disc"] * 4)
    state = torch.get_rng_state()
    assert drop_captions(network, text, 0.0) is text
    assert torch.equal(torch.get_rng_state(), state)
    network.text.unconditional = None  # fails if it is called
    torch.manual_seed(0)
    assert drop_captions(network, text, 1e-9) is text


class Elsewhere(TorchFunctionMode):
    """Simulates a GPU by the ``meta`` device: a generator on a different device raises, and conditions are true."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        result = function(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if generator is not None and generator.device.type != result.device.type:
            raise RuntimeError(f"expected a generator on {result.device}")
        return result


def test_generators_are_on_the_device_of_the_result():
    network = cogvideox(in_channels=6, tubelet_size=2, num_frames=6).to("meta")
    on_cpu, video = torch.Generator().manual_seed(0), torch.rand(2, 3, 5, 8, 8, device="meta")
    with Elsewhere():
        with pytest.raises(RuntimeError, match="expected a generator on meta"):
            torch.randn(2, generator=on_cpu, device="meta")
        assert sample(Pixels().encode(video), on_cpu).is_meta
        latents, image = latents_of(network, {"video": video, "id": ["a", "b"]}, on_cpu)
        text = drop_captions(network, network.text(["disc"] * 2), 1.0)
        _, noisy = latents_of(network, {"video": video, "id": ["a", "b"]}, None, ImageNoise())
        settings = DPMSolverSDE(3), ConstantGuidance(), VPrediction()
        made = generate(network, ["disc"] * 2, (5, 8, 8), *settings, video[:, :, :1], on_cpu)
    assert all(found.is_meta for found in (latents, image, text.tokens, noisy, draw_image_mask(image, 0.5), made))
    assert made.shape == (2, 3, 5, 8, 8)
