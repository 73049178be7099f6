"""Precompute: latents and text embeddings of an experiment as shards."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.data.latents import LatentClips
from blueberry_video.data.sprites import Sprites
from blueberry_video.diffusion.encoding import encode
from blueberry_video.models.autoencoder.base import Autoencoder, Pixels, fingerprint
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.precompute import run, write_latents


class FrozenText(WordText):
    """Frozen text encoder: its embeddings are stored."""

    frozen = True


def sprites(**changes) -> Sprites:
    return Sprites(**{"split": "val", "size": 5, "num_frames": 3, "image_size": 16, **changes})


def frozen_text(data: Sprites) -> FrozenText:
    text = FrozenText(text_dim=6, length=24, pooled_dim=4).eval()
    text.learn(data[i]["caption"] for i in range(len(data)))
    return text


def test_stored_moments_and_text_equal_the_outputs_of_the_modules(tmp_path: Path):
    data = sprites()
    text = frozen_text(data)
    write_latents(data, Pixels(), text, tmp_path, shard_size=2)
    clips = LatentClips(tmp_path)
    assert clips.classes == data.classes
    assert clips.made_of == {
        "autoencoder": f"Pixels/{fingerprint(Pixels())}",
        "text": f"FrozenText/{fingerprint(text)}",
        "data": data.cache_key,
        "dtype": "float32",
        "image": False,
        "size": 5,
        "shard_size": 2,
    }
    for i in range(5):
        stored, clip = clips[i], data[i]
        pixels = Pixels().decode(Pixels().latents(stored["moments"][None]))[0]
        assert torch.equal(pixels.add(1).mul(127.5).round().byte().transpose(0, 1), clip["video"])
        tokens, mask, pooled = text([clip["caption"]])
        assert torch.equal(stored["text_tokens"], tokens[0])
        assert torch.equal(stored["text_mask"], mask[0])
        assert torch.equal(stored["text_pooled"], pooled[0])
        assert {key: stored[key] for key in ("id", "caption", "labels", "fps")} == {
            key: clip[key] for key in ("id", "caption", "labels", "fps")
        }


class Smearing(Pixels):
    """Autoencoder where the first latent depends on all frames, as in published autoencoders.

    A single frame is encoded to half its pixels, so that the latents of different images differ.
    """

    first_frame_alone = False

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return super().encode(video - video.mean(dim=2, keepdim=True) / 2)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace", None])
def test_image_conditioning_stores_the_first_frame_encoded_separately(tmp_path: Path, kind: str | None):
    with torch.device("meta"):
        network = HunyuanVideo(
            in_channels=7 if kind == "latent_concat" else 3,
            out_channels=3,
            num_heads=1,
            head_dim=16,
            depth=1,
            single_depth=0,
            refiner_depth=1,
            text_dim=8,
            rope_axes=(4, 6, 6),
            image_condition=kind,
        )
    data = sprites()
    write_latents(data, Smearing(), None, tmp_path / "smearing", network=network)
    write_latents(data, Pixels(), None, tmp_path / "exact", network=network)
    stored = LatentClips(tmp_path / "smearing")[0]
    assert ("image_moments" in stored) == (kind is not None)
    assert "image_moments" not in LatentClips(tmp_path / "exact")[0]
    if kind is not None:
        video = data[0]["video"].transpose(0, 1)[None].float() / 127.5 - 1
        assert torch.equal(stored["image_moments"], Smearing().encode(video[:, :, :1])[0])
        assert torch.equal(stored["image_moments"][:3], video[0, :, :1] / 2)
        assert not torch.equal(video[:, :, 0], video[:, :, -1])
        assert not torch.equal(stored["image_moments"], stored["moments"][:, :1])


def test_only_captions_are_stored_for_a_trainable_text_encoder(tmp_path: Path):
    write_latents(sprites(), Pixels(), WordText(6), tmp_path, dtype="bfloat16")
    clips = LatentClips(tmp_path)
    assert clips[0].keys() == {"moments", "id", "caption", "labels", "fps"}
    assert clips[0]["moments"].dtype == torch.bfloat16
    assert clips.made_of["text"] is None


def test_folder_of_other_weights_or_data_raises(tmp_path: Path):
    data = sprites()
    text = frozen_text(data)
    write_latents(data, Pixels(), text, tmp_path)
    with torch.no_grad():
        text.position[0, 0] += 1
    with pytest.raises(ValueError, match=r"text\b.*FrozenText/\w+ .*FrozenText/"):
        write_latents(data, Pixels(), text, tmp_path)
    with pytest.raises(ValueError, match=r"\bdata\b.*sprites"):
        write_latents(sprites(image_size=24), Pixels(), None, tmp_path)


class Overflowing(Autoencoder):
    """Autoencoder with NaN means, as in published autoencoders in float16."""

    def __init__(self):
        super().__init__(3, (1, 1, 1))

    def encode(self, video):
        return torch.cat([video * torch.nan, video], dim=1)

    def decode(self, latents):
        return latents


def test_invalid_clips_raise(tmp_path: Path):
    clip = sprites()[0]
    with pytest.raises(ValueError, match=f"{re.escape(clip['id'])}.*caption"):
        encode({**clip, "caption": ""}, Pixels(), None, torch.float32)

    class Halves(Pixels):
        def __init__(self):
            super().__init__()
            self.stride, self.frame_step = (2, 2, 2), 2

    with pytest.raises(ValueError, match=rf"{re.escape(clip['id'])}.*num_frames=2\b.*\b1\b.*\b3\b"):
        encode({**clip, "video": clip["video"][:2]}, Halves(), None, torch.float32)
    with pytest.raises(ValueError, match=r"height=16\b.*\b6\b.*\b3\b"):
        encode({**clip, "video": clip["video"][:1]}, Halves(), None, torch.float32, (3, 3))
    with pytest.raises(ValueError, match=f"moments .*{re.escape(clip['id'])}.*NaN"):
        write_latents(sprites(), Overflowing(), None, tmp_path)
    varying = sprites()
    varying.varies_by_epoch = True
    with pytest.raises(ValueError, match=r"Sprites.*epoch"):
        write_latents(varying, Pixels(), None, tmp_path / "other")


def config(model: dict) -> OmegaConf:
    data = {"_target_": "blueberry_video.data.sprites.Sprites", "num_frames": 3, "image_size": 16, "size": 3}
    module = {"_target_": "blueberry_video.data.datamodule.DataModule", "batch_size": 1}
    splits = {split: {**data, "split": split} for split in ("train", "val")}
    return OmegaConf.create({"name": "tiny", "seed": 0, "model": model, "data": {**module, **splits}})


def test_every_split_of_an_experiment_is_encoded(tmp_path: Path):
    autoencoder = {"_target_": "blueberry_video.models.autoencoder.base.Pixels", "_partial_": True}
    text = {"_partial_": True, "_target_": "blueberry_video.models.text_encoder.words.WordText", "text_dim": 4}
    transformer = {"_target_": "blueberry_video.models.cogvideox.CogVideoX", "in_channels": 3, "out_channels": 3}
    transformer |= {"num_heads": 1, "head_dim": 16, "depth": 1, "height": 16, "width": 16}
    read = run(config({"autoencoder": autoencoder, "text": text, "transformer": transformer}), tmp_path)
    folders = [f"data.{split}.folder={tmp_path}/{split}" for split in ("train", "val")]
    assert read == ["data=latents", *folders, "data.batch_size=1"]
    assert [len(LatentClips(tmp_path / split)) for split in ("train", "val")] == [3, 3]
    assert LatentClips(tmp_path / "train")[0]["id"] != LatentClips(tmp_path / "val")[0]["id"]


def test_experiment_without_autoencoder_or_with_stored_latents_raises(tmp_path: Path):
    for model in ({"_target_": "somewhere.Classifier"}, {"_target_": "somewhere.TextToVideo", "autoencoder": None}):
        with pytest.raises(ValueError, match=f"model={re.escape(model['_target_'])} .*autoencoder"):
            run(config(model), tmp_path)
    stored = config({"autoencoder": {"_target_": "blueberry_video.models.autoencoder.base.Pixels"}})
    stored.data.train = {"_target_": "blueberry_video.data.latents.LatentClips", "folder": "nowhere"}
    with pytest.raises(ValueError, match=r"name=tiny .*LatentClips.*data=captioned_videos"):
        run(stored, tmp_path)
