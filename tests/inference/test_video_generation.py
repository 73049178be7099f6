"""Streaming generation of pixels: equal to decoding all tokens at once, lazy, constant states, errors."""

import doctest
import itertools

import pytest
import torch
from torch import Tensor

from blueberry_video.inference import video_generation
from blueberry_video.inference.frame_generation import FrameDecoding, generate_clips
from blueberry_video.inference.video_generation import stream_video
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.models.hydra_video.quantizers import FSQ
from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer

STEP, SIDE = 2, 8  # frames of pixels per frame of tokens, pixels


def tokenizer(**changes) -> HydraVideoTokenizer:
    torch.manual_seed(1)
    sizes = {"image_size": SIDE, "patch_size": (1, 2), "dims": [8, 16], "depths": [1, 1], "pools": [(STEP, 2)]}
    network = HydraVideoTokenizer(FSQ([4, 4]), **{**sizes, "head_dim": 8, "state_dim": 4, **changes})
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.double().eval()


def generator(**changes) -> HydraVideoGenerator:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, "mlp_ratio": 1.0, "memory_frames": 4}
    options |= {"num_classes": {"motion": 3}, "num_actions": 4, "actions_per_frame": STEP}
    network = HydraVideoGenerator(16, (2, 2), **{**options, **changes})
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.double().eval()


def motion(*labels: int) -> Conditioning:
    return Conditioning({"motion": torch.tensor(labels)})


def actions(frames: int, batch: int = 2) -> Tensor:
    return torch.randint(4, (batch, frames, STEP), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", ["cached", "parallel", "autoregressive"])
@pytest.mark.parametrize("known", [0, 1, 3])
@pytest.mark.parametrize("acted", [False, True])
def test_stream_equals_decoding_all_tokens_at_once(mode: str, known: int, acted: bool):
    model, decoder, decoding, frames = generator(), tokenizer(), FrameDecoding(2, guidance=1.5, mode=mode), 5
    video = torch.rand(2, 3, 1 + (known - 1) * STEP, SIDE, SIDE, dtype=torch.float64) * 2 - 1 if known else None
    given = actions(frames - 1) if acted else None
    streamed = list(
        stream_video(
            *(model, decoder, motion(0, 2), 1 + (frames - 1) * STEP, decoding, video),
            actions=None if given is None else given[:, max(known - 1, 0) :],
            prompt_actions=None if given is None or not known else given[:, : known - 1],
            generator=[5, 6],
        )
    )
    assert [part.shape for part in streamed] == [(2, 3, 1 if k == 0 else STEP, SIDE, SIDE) for k in range(frames)]
    prompt_ids = None if video is None else decoder.encode_ids(video)
    conditioning = motion(0, 2)._replace(actions=given)
    ids = generate_clips(model, conditioning, frames, decoding, prompt_ids, [5, 6])
    torch.testing.assert_close(torch.cat(streamed, dim=2), decoder.decode_ids(ids), rtol=1e-10, atol=1e-10)
    assert torch.cat(streamed, dim=2).abs().max() <= 1


def test_stream_in_float32_equals_decoding_at_once():
    model, decoder = generator().float(), tokenizer().float()
    streamed = torch.cat(list(stream_video(model, decoder, motion(1), 9, generator=[0])), dim=2)
    ids = generate_clips(model, motion(1), 5, FrameDecoding(), generator=[0])
    torch.testing.assert_close(streamed, decoder.decode_ids(ids), rtol=1e-5, atol=1e-5)


def test_stream_is_unlimited_and_its_states_keep_their_size(monkeypatch: pytest.MonkeyPatch):
    model, decoder = generator(), tokenizer()
    sizes, decode = [], decoder.decode_stream

    def size(state) -> int:
        if isinstance(state, Tensor):
            return state.numel()
        return sum(size(part) for part in state) if isinstance(state, tuple | list) else 0

    def recorded(ids: Tensor, state=None):
        video, state = decode(ids, state)
        sizes.append((ids.shape[1], size(state)))
        return video, state

    monkeypatch.setattr(decoder, "decode_stream", recorded)
    stream = stream_video(model, decoder, generator=[0])
    assert sizes == []  # nothing is decoded before the first frame is read
    for count, _ in enumerate(itertools.islice(stream, 12), start=1):
        assert len(sizes) == count
    assert {frames for frames, _ in sizes} == {1}
    assert len({total for _, total in sizes[1:]}) == 1


def test_length_is_that_of_the_actions():
    parts = list(stream_video(generator(), tokenizer(), actions=actions(3), generator=[0, 1]))
    assert sum(part.shape[2] for part in parts) == 1 + 3 * STEP
    video = torch.zeros(2, 3, 3, SIDE, SIDE)
    parts = list(stream_video(generator(), tokenizer(), prompt=video, actions=actions(3), generator=[0, 1]))
    assert sum(part.shape[2] for part in parts) == 3 + 3 * STEP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 4}, r"num_frames=4\b.*\b3 or 5\b"),
        ({"num_frames": 0}, r"num_frames=0\b.*\b1\b"),
        ({"num_frames": 3, "prompt": (1, 3, 3)}, r"num_frames=3\b.*\b3 frames.*\b5\b"),
        ({"prompt": (1, 3, 2)}, r"prompt has shape \(1, 3, 2, 8, 8\).*\b1 or 3\b"),
        ({"prompt": (1, 4, 3)}, r"prompt has shape \(1, 4, 3, 8, 8\).*image_size=8"),
        ({"prompt": (1, 3, 3), "prompt_actions": 2}, r"prompt_actions has 2\b.*pass 1\b"),
        ({"num_frames": 5, "actions": 4}, r"actions has 4\b.*num_frames=5 requires 2\b.*num_frames=9\b"),
        ({"num_frames": 5, "prompt": (1, 3, 3), "actions": 4}, r"actions has 4\b.*requires 1\b.*num_frames=11\b"),
    ],
)
def test_numbers_that_do_not_fit_raise_before_the_first_frame(changes: dict, message: str):
    for key in ("actions", "prompt_actions"):
        if key in changes:
            changes = {**changes, key: actions(changes[key], 1)}
    if "prompt" in changes:
        changes = {**changes, "prompt": torch.zeros(*changes["prompt"], SIDE, SIDE)}
    with pytest.raises(ValueError, match=message):
        stream_video(generator(), tokenizer(), **changes)


@pytest.mark.parametrize("changes", [{"image_size": 16}, {"quantizer": FSQ([4, 5])}])
def test_tokenizer_of_a_different_size_raises(changes: dict):
    network = HydraVideoTokenizer(
        **{"quantizer": FSQ([4, 4]), "image_size": 8, "patch_size": (2, 4), "dims": [8], "depths": [0], **changes},
        pools=[],
    )
    with pytest.raises(ValueError, match=rf"vocabulary=16 and grid=\(2, 2\).*vocabulary={network.vocabulary}\b"):
        stream_video(generator(), network)


def test_examples():
    assert doctest.testmod(video_generation).failed == 0
