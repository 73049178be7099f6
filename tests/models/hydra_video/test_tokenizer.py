"""Hydra Video tokenizer: shapes, causality, streaming, images, and input that does not fit."""

import pytest
import torch

from blueberry_video.models.hydra_video.quantizers import FSQ, LFQ, VQ
from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer, Merge, Split
from blueberry_video.weights.files import read_weights

SETTINGS = {"image_size": 8, "patch_size": (1, 2), "dims": (8, 12), "depths": (1, 1), "pools": ((2, 2),)}
SMALL = {"expand": 1, "head_dim": 4, "state_dim": 4}


def tokenizer(quantizer=None, **changes) -> HydraVideoTokenizer:
    torch.manual_seed(0)
    return HydraVideoTokenizer(quantizer or FSQ((5, 4, 3)), **{**SETTINGS, **SMALL, **changes}).double().eval()


def video(frames: int, batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(3)).double() * 2 - 1


@pytest.mark.parametrize("quantizer", [FSQ((5, 4, 3)), VQ(7, 3), LFQ(4)], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_clip_becomes_tokens_and_a_clip_again(quantizer, frames):
    model = tokenizer(quantizer)
    ids = model.encode_ids(video(frames))
    assert ids.shape == (2, *model.grid(frames, 8, 8)) == (2, 1 + (frames - 1) // 2, 2, 2)
    assert ids.min() >= 0
    assert ids.max() < model.vocabulary == quantizer.vocabulary
    made = model.decode_ids(ids)
    assert made.shape == (2, 3, frames, 8, 8)
    assert made.abs().max() <= 1
    whole, tokens = model(video(frames))
    torch.testing.assert_close(whole.clamp(-1, 1), made)
    assert torch.equal(tokens.ids, ids)


def test_tokens_do_not_depend_on_later_frames():
    model = tokenizer()
    clip = video(7, batch=1).requires_grad_()
    x, _ = model._encode(clip, None, False)  # before rounding
    for t in range(4):
        (gradient,) = torch.autograd.grad(x[:, t].square().sum(), clip, retain_graph=True)
        per_frame = gradient.abs().amax(dim=(0, 1, 3, 4))
        assert (per_frame[: 2 * t + 1] > 0).all()
        assert (per_frame[2 * t + 1 :] == 0).all()


def test_frames_do_not_depend_on_later_tokens():
    model = tokenizer()
    values = torch.randn(1, 4, 2, 2, 3, dtype=torch.double, requires_grad=True)
    made = model.reconstruct(values)
    for frame in range(7):
        (gradient,) = torch.autograd.grad(made[:, :, frame].square().sum(), values, retain_graph=True)
        per_frame = gradient.abs().amax(dim=(0, 2, 3, 4))
        last = (frame + 1) // 2
        assert (per_frame[: last + 1] > 0).all()
        assert (per_frame[last + 1 :] == 0).all()


@pytest.mark.parametrize("pools", [((2, 2),), ((1, 2),), ((4, 1),)])
@pytest.mark.parametrize("patch_size", [(1, 2), (2, 2)])
def test_a_stream_has_the_tokens_and_frames_of_the_whole_video(pools, patch_size):
    model = tokenizer(pools=pools, patch_size=patch_size)
    step = model.stride[0]
    clip = video(1 + 4 * step)
    ids = model.encode_ids(clip)
    state, found = None, []
    for start, end in ((0, 1), (1, 1 + step), (1 + step, 1 + 4 * step)):
        part, state = model.encode_stream(clip[:, :, start:end], state)
        found.append(part)
    assert torch.equal(torch.cat(found, dim=1), ids)
    state, frames = None, []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        part, state = model.decode_stream(ids[:, start:end], state)
        frames.append(part)
    torch.testing.assert_close(torch.cat(frames, dim=2), model.decode_ids(ids), atol=1e-12, rtol=0)


def test_a_stream_has_a_state_of_constant_size():
    model, state, sizes = tokenizer(), None, set()
    for step in range(6):
        _, state = model.encode_stream(video(1 if step == 0 else 4), state)
        sizes.add(tuple(tensor.untyped_storage().nbytes() for layer in state for tensor in layer))
    assert len(sizes) == 1


def test_an_image_is_a_video_of_one_frame():
    model, clip = tokenizer(), video(5)
    image = model.encode_ids(clip[:, :, :1])
    assert torch.equal(image, model.encode_ids(clip)[:, :1])
    torch.testing.assert_close(model.decode_ids(image), model.decode_ids(model.encode_ids(clip))[:, :, :1])


def test_every_weight_has_a_gradient():
    model = tokenizer().train()
    made, tokens = model(video(5))
    ((made - video(5)).square().mean() + tokens.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_as_an_autoencoder_its_latents_are_the_codes():
    model = tokenizer()
    moments = model.encode(video(5))
    latents = model.latents(moments)
    assert latents.shape == (2, 3, 3, 2, 2)
    torch.testing.assert_close(latents.permute(0, 2, 3, 4, 1), model.tokens(video(5)).values.float(), check_dtype=False)
    torch.testing.assert_close(model.decode(latents), model.decode_ids(model.encode_ids(video(5))))


def test_merge_and_split_group_the_frames_after_the_first():
    merge, split = Merge(1, 4, 2, 2), Split(4, 1, 2, 2)
    x = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 2, 2, 1)
    torch.nn.init.constant_(merge.project.weight, 1.0)
    torch.nn.init.zeros_(merge.project.bias)
    assert merge(x, first=True)[0, :, 0, 0, 0].tolist() == [0, 4 * 3, 4 * 7]  # (0, 0), (1, 2), (3, 4)
    assert merge(x[:, 1:], first=False)[0, :, 0, 0, 0].tolist() == [4 * 3, 4 * 7]
    assert split(merge(x, True), True).shape == (1, 5, 2, 2, 1)
    assert split(merge(x[:, 1:], False), False).shape == (1, 4, 2, 2, 1)


def test_weights_of_a_checkpoint_are_loaded(tmp_path):
    model, other = tokenizer(), tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.ckpt"
    )
    assert read_weights(tmp_path / "a.ckpt").keys() == model.state_dict().keys()
    other.load_published(tmp_path / "a.ckpt")
    torch.testing.assert_close(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("clip", "match"),
    [
        (lambda: video(4), r"num_frames=4\b.*\b3\b.*\b5\b"),
        (lambda: video(3, size=10), r"height=10\b.*\b8\b"),
        (lambda: video(3, size=12), r"\(12, 12\).*image_size=8"),
        (lambda: video(3)[0], r"\(3, 3, 8, 8\)"),
    ],
)
def test_clips_that_do_not_fit_raise(clip, match):
    with pytest.raises(ValueError, match=match):
        tokenizer().encode_ids(clip())


def test_later_parts_of_a_stream_are_whole_groups():
    model = tokenizer()
    _, state = model.encode_stream(video(3))
    with pytest.raises(ValueError, match=r"num_frames=4\b"):  # counts the frame before them
        model.encode_stream(video(3), state)


def test_ids_that_do_not_fit_raise():
    model = tokenizer()
    with pytest.raises(ValueError, match=r"vocabulary=60"):
        model.decode_ids(torch.full((1, 1, 2, 2), 60))
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 2\)"):
        model.decode_ids(torch.zeros(1, 1, 3, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dims": (8,)}, r"dims=\[8\]"),
        ({"pools": ((0, 2),)}, r"pools=\[\(0, 2\)\]"),
        ({"image_size": 10}, r"image_size=10.*use 8"),
    ],
)
def test_settings_that_do_not_fit_raise(changes, match):
    with pytest.raises(ValueError, match=match):
        tokenizer(**changes)
