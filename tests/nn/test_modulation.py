"""adaLN modulation with one conditioning vector per clip or per frame."""

import torch

from blueberry_video.nn.modulation import gated, modulate


def by_token(values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return values.repeat_interleave(num_tokens // values.shape[1], dim=1)


def test_tokens_of_a_frame_are_modulated_by_its_vector():
    x, branch = torch.randn(2, 2, 12, 5)
    for num_conditions in (1, 3):
        shift, scale, gate = torch.randn(3, 2, num_conditions, 5)
        expected = x * (1 + by_token(scale, 12)) + by_token(shift, 12)
        torch.testing.assert_close(modulate(x, shift, scale), expected)
        torch.testing.assert_close(gated(x, gate, branch), x + by_token(gate, 12) * branch)


def test_equal_vectors_per_frame_equal_one_vector_per_clip():
    x, shift, scale = torch.randn(2, 12, 5), torch.randn(2, 1, 5), torch.randn(2, 1, 5)
    spread = modulate(x, shift.expand(-1, 4, -1), scale.expand(-1, 4, -1))
    torch.testing.assert_close(spread, modulate(x, shift, scale), atol=0, rtol=0)


def test_empty_sequences_keep_their_shape():
    empty, value = torch.zeros(2, 0, 5), torch.ones(2, 1, 5)
    assert modulate(empty, value, value).shape == gated(empty, value, empty).shape == (2, 0, 5)


def test_gradients_equal_finite_differences():
    leaves = [torch.randn(2, 6, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(modulate, leaves)
    assert torch.autograd.gradcheck(gated, [leaves[0], leaves[1], leaves[0].detach().clone().requires_grad_()])
