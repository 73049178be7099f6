"""Visible tokens grouped by frame: encoding with padding, padding mask and order."""

import torch

from blueberry_video.nn.kept_tokens import KeptTokens


def test_tokens_are_encoded_per_frame_padded_and_returned_in_order():
    keep = torch.tensor([[7, 0, 2, 3], [11, 4, 9, 6]])  # of 3 frames of 2 x 2 tokens; per frame 3, 1, 0 and 0, 2, 2
    kept, video = KeptTokens(keep, 2, (3, 2, 2)), torch.arange(6.0).view(2, 1, 3, 1, 1)
    calls = []

    def encoder(frames, index):
        calls.append(index.shape[1])
        return torch.stack([frames.flatten()[:, None].expand(index.shape), index.float()], dim=2)

    encoded = kept.encode(video, encoder)
    assert calls == [1, 2, 3]  # one call per number of tokens, none for empty frames
    assert kept.valid().sum(dim=2).tolist() == [[3, 1, 0], [0, 2, 2]]
    assert not encoded[~kept.valid()].any()
    expected = torch.stack([keep // 4 + torch.tensor([[0], [3]]), keep % 4], dim=2).float()
    assert torch.equal(kept.pick(encoded), expected)


def test_no_padding_mask_if_all_frames_keep_equally_many_tokens():
    assert KeptTokens(torch.tensor([[5, 0], [1, 4]]), 2, (2, 2, 2)).valid() is None
