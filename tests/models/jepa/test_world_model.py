"""The world model: what sees what, one step after the other against all at once, and what is never trained."""

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.models.jepa.world_model import CONDITIONS, WorldModel, block_causal_mask, from_published
from blueberry_video.models.vit import VisionTransformer

B, T, S, D, A, K = 2, 4, 4, 12, 3, 2  # frames of 2 x 2 patches


def encoder(**changes) -> VisionTransformer:
    options = {"image_size": 16, "num_frames": 4, "patch_size": 8, "embed_dim": D, "depth": 1, "num_heads": 2}
    return VisionTransformer(**{**options, "images": True, **changes})


@pytest.fixture
def model() -> WorldModel:
    """With weights so large that every token matters to every other that may see it."""
    built = WorldModel(encoder(), A, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2)
    for parameter in built.predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = F.layer_norm(torch.randn(B, T, S, D, dtype=dtype), (D,))
    return latents, torch.randn(B, T - 1, A, dtype=dtype), torch.randn(B, T, K, dtype=dtype)


def test_no_future_leakage(model):
    """The derivative of a prediction by anything of a later step is exactly 0; by all of its own and earlier, not."""
    model.double()
    latents, actions, states = inputs(torch.float64)
    latents, actions, states = latents[:1], actions[:1], states[:1]
    jacobians = torch.autograd.functional.jacobian(model, (latents, actions, states))
    for by in jacobians:  # (1, T-1, S, D, 1, steps, ...)
        influence = by.abs().flatten(6).amax(dim=(0, 2, 3, 4, 6))  # (T-1, steps)
        for to in range(T - 1):
            assert (influence[to, : to + 1] > 1e-6).all()
            assert (influence[to, to + 1 :] == 0).all()


def test_every_token_sees_all_of_its_own_step(model):
    """Block-causal, and not causal from token to token: the first patch depends on the last of its frame."""
    latents, actions, states = inputs()
    latents.requires_grad_()
    model(latents, actions, states)[0, 0, 0, 0].backward()
    assert (latents.grad[0, 0].abs().amax(dim=1) > 0).all()


def test_it_can_start_as_a_copy_and_learn_from_there():
    built = WorldModel(
        encoder(), A, K, predictor_dim=D + 4, predictor_depth=2, predictor_num_heads=2, starts_as_copy=True
    )
    latents, actions, states = inputs()
    predictions = built(latents, actions, states)
    torch.testing.assert_close(predictions, latents[:, :-1], atol=1e-4, rtol=0)
    (predictions - latents[:, 1:]).abs().mean().backward()
    assert all((block.attn.proj.weight.grad != 0).any() for block in built.predictor.blocks)
    with pytest.raises(ValueError, match=r"starts_as_copy=true needs model\.predictor_dim=12 above"):
        WorldModel(encoder(), A, K, predictor_dim=D, predictor_num_heads=2, starts_as_copy=True)


def test_mask_equals_loops():
    tokens, first, steps = 3, 2, 2
    mask = block_causal_mask(first, steps, tokens, torch.device("cpu"))
    assert mask.shape == (steps * tokens, (first + steps) * tokens)
    for query in range(len(mask)):
        for key in range(mask.shape[1]):
            assert mask[query, key] == (key // tokens <= first + query // tokens)


def test_attention_equals_a_dense_formula(model):
    """Rotation, mask and all, in float64, against the definition with a softmax over every key."""
    model.double()
    attention, dim, tokens = model.predictor.blocks[0].attn, 24, CONDITIONS + S
    x = torch.randn(B, 2 * tokens, dim, dtype=torch.float64)
    places = [(t, *place) for t in range(2) for place in [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]]
    got, _ = attention(x, model.predictor._rotation(0, 2, x), block_causal_mask(0, 2, tokens, x.device))
    expected = torch.zeros_like(x)
    for b in range(B):
        for head in range(2):
            q, k, v = (part[:, 12 * head : 12 * head + 12] for part in attention.qkv(x[b]).chunk(3, dim=-1))
            q, k = (torch.stack([turned(row, place) for row, place in zip(rows, places)]) for rows in (q, k))
            scores = q @ k.T / 12**0.5
            for n in range(len(places)):
                for m in range(len(places)):
                    if places[m][0] > places[n][0]:
                        scores[n, m] = -torch.inf
            expected[b, :, 12 * head : 12 * head + 12] = scores.softmax(dim=1) @ v
    torch.testing.assert_close(got, attention.proj(expected), atol=1e-10, rtol=1e-10)


def turned(row: torch.Tensor, place: tuple[int, int, int]) -> torch.Tensor:
    """A head of 12 channels: 4 an axis, as complex numbers that turn by place * 10000^(-i / 2)."""
    numbers = torch.view_as_complex(row.reshape(6, 2))
    angles = torch.tensor([p * 10000 ** (-i / 2) for p in place for i in range(2)], dtype=torch.float64)
    return torch.view_as_real(numbers * torch.polar(torch.ones(6, dtype=torch.float64), angles)).flatten()


def test_rollout_equals_the_definition(model):
    """Each frame from a run over the whole sequence so far, without anything kept; also its gradient."""
    latents, actions, states = inputs()
    frames = latents[:, :1]
    for t in range(1, T):
        padded = torch.cat([frames, torch.zeros(B, 1, S, D)], dim=1)  # the last is not looked at
        frames = torch.cat([frames, model(padded, actions[:, :t], states[:, :t])[:, -1:]], dim=1)
    rolled = model.rollout(latents[:, :1], actions, states)
    torch.testing.assert_close(rolled, frames[:, 1:], atol=1e-5, rtol=1e-5)
    weights, to = list(model.predictor.parameters()), torch.randn_like(rolled)
    gradients = [torch.autograd.grad((result * to).sum(), weights) for result in (rolled, frames[:, 1:])]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_the_first_step_of_a_rollout_is_teacher_forced(model):
    latents, actions, states = inputs()
    torch.testing.assert_close(
        model.rollout(latents[:, :1], actions[:, :1], states), model(latents, actions, states)[:, :1]
    )


def test_time_matters_and_so_do_places(model):
    """Two frames exchanged, or two patches, give other predictions: nothing but the rotation tells them apart."""
    latents, actions, states = inputs()
    actions, states = actions[:, :1].expand_as(actions), states[:, :1].expand_as(states)
    last = model(latents, actions, states)[:, -1]
    assert not torch.allclose(model(latents[:, [1, 0, 2, 3]], actions, states)[:, -1], last, atol=1e-4)
    order = [1, 0, 3, 2]
    assert not torch.allclose(model(latents[:, :, order], actions, states)[:, -1][:, order], last, atol=1e-4)


def test_half_precision_does_not_round_the_places(model):
    exact = model.predictor._rotation(300, 2, torch.zeros(1))
    for given, dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        turn = model.predictor._rotation(300, 2, torch.zeros(1, dtype=given))
        assert turn.cos.dtype == turn.sin.dtype == dtype
        torch.testing.assert_close(turn.cos.float(), exact.cos, rtol=0, atol=1e-6)


def test_frames_are_encoded_alone_and_normalised(model):
    video = torch.randn(B, 3, T, 16, 16)
    latents = model.encode_frames(video)
    assert latents.shape == (B, T, S, D)
    torch.testing.assert_close(latents.mean(dim=-1), torch.zeros(B, T, S), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.var(dim=-1, correction=0), torch.ones(B, T, S), atol=1e-3, rtol=0)
    still = video[:, :, 2:3].expand(-1, -1, 4, -1, -1)  # a clip of that frame: its first tubelet has the same tokens
    first = model.encoder.patch_embed(still)[:, :S] + model.encoder.positions[:S]
    alone = model.encoder.norm(model.encoder.blocks[0](first))
    torch.testing.assert_close(latents[:, 2], F.layer_norm(alone, (D,)))


def test_the_outputs_are_those_at_the_patches():
    """Without blocks, a patch's output depends on that patch alone."""
    built = WorldModel(encoder(), A, K, predictor_dim=24, predictor_depth=0, predictor_num_heads=2)
    latents, actions, states = inputs()
    alone = built.predictor.proj(built.predictor.norm(built.predictor.embed(latents[:, :-1])))
    torch.testing.assert_close(built(latents, actions, states), F.layer_norm(alone, (D,)))


def test_predictions_are_normalised(model):
    predicted = model(*inputs())
    torch.testing.assert_close(predicted.mean(dim=-1), torch.zeros(B, T - 1, S), atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted.var(dim=-1, correction=0), torch.ones(B, T - 1, S), atol=1e-3, rtol=0)


def test_every_parameter_but_the_encoders_gets_a_gradient():
    built = WorldModel(encoder(drop_path=0.5), A, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2)
    latents, actions, states = inputs()
    (built(latents, actions, states) - latents[:, 1:]).abs().mean().backward()
    assert all(parameter.grad is not None for parameter in built.predictor.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in built.predictor.parameters())
    assert not any(parameter.requires_grad for parameter in built.encoder.parameters())
    assert not built.train().encoder.training
    assert built.predictor.training
    assert not built.encode_frames(torch.randn(1, 3, 2, 16, 16)).requires_grad


def test_it_works_on_longer_clips_than_any_it_has_seen(model):
    latents = F.layer_norm(torch.randn(1, 9, S, D), (D,))
    assert model(latents, torch.randn(1, 8, A), torch.randn(1, 9, K)).shape == (1, 8, S, D)
    assert model.rollout(latents[:, :1], torch.randn(1, 8, A), torch.randn(1, 8, K)).shape == (1, 8, S, D)


def original(built: WorldModel) -> dict[str, dict[str, torch.Tensor]]:
    """A model's weights as a file of the vjepa2 repository holds them."""
    own = ("embed.", "blocks.", "norm.", "proj.")
    predictor = {
        f"module.{'predictor_' if name.startswith(own) else ''}{name}": value
        for name, value in built.predictor.state_dict().items()
    }
    unused = {f"module.extrinsics_encoder.{kind}": torch.zeros(24) for kind in ("weight", "bias")}
    encoder = {f"module.backbone.{name}": value for name, value in built.encoder.state_dict().items()}
    return {"encoder": encoder, "predictor": predictor | unused, "epoch": 3}


def published() -> WorldModel:
    """Tiny, but as the published one is built."""
    frozen = encoder(qkv_bias="qkv", positions="rope_3d", rope_quirk=True, init="trunc_normal")
    return WorldModel(frozen, 5, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2, rope_quirk=True)


def test_published_weights_load_and_compute_the_same(tmp_path, capsys):
    built = published()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(original(built), tmp_path / "ac.pt")
    loaded = from_published(tmp_path / "ac.pt", num_frames=4, image_size=16, num_heads=2, predictor_num_heads=2)
    assert "the file's 'encoder' and 'predictor'" in capsys.readouterr().out
    video, actions, states = torch.randn(1, 3, 3, 16, 16), torch.randn(1, 2, 5), torch.randn(1, 2, K)
    torch.testing.assert_close(loaded.encode_frames(video), built.encode_frames(video))
    latents = built.encode_frames(video)
    torch.testing.assert_close(loaded(latents, actions, states), built(latents, actions, states))
    built.predictor.rope_quirk = False
    assert not torch.allclose(loaded(latents, actions, states), built(latents, actions, states), atol=1e-3)


@pytest.mark.parametrize(
    ("lost", "error", "text"),
    [
        ("encoder", ValueError, "the file holds no 'encoder'"),
        ("predictor", ValueError, "the file holds no 'predictor'"),
        ("module.action_encoder.weight", ValueError, "has no action_encoder, so it is not"),
        ("module.predictor_proj.bias", RuntimeError, r"Missing key.*predictor\.proj\.bias"),
    ],
)
def test_files_of_other_models_are_refused(tmp_path, lost, error, text):
    content = original(published())
    (content if lost in content else content["predictor"]).pop(lost)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(error, match=text):
        from_published(tmp_path / "other.pt", 4, 16, 2, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"actions": torch.zeros(B, T - 1, A + 1)}, r"actions have the shape \(2, 3, 4\) but must have \(2, 3, 3\)"),
        ({"actions": torch.zeros(B, T, A)}, r"actions have the shape \(2, 4, 3\) but must have \(2, 3, 3\)"),
        ({"states": torch.zeros(B, T, K + 1)}, r"states have the shape \(2, 3, 3\).*model\.state_dim=2"),
        ({"latents": torch.zeros(B, T, S + 1, D)}, r"latents have the shape \(2, 4, 5, 12\) but must have"),
        ({"latents": torch.zeros(B, 1, S, D)}, "nothing to predict"),
    ],
)
def test_other_shapes_are_refused(model, changes, text):
    given = dict(zip(("latents", "actions", "states"), inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=text):
        model(**given)


def test_a_rollout_checks_its_shapes_too(model):
    latents, actions, states = inputs()
    with pytest.raises(ValueError, match=r"latents have the shape \(2, 4, 4, 12\) but must have \(2, 1, 4, 12\)"):
        model.rollout(latents, actions, states)
    with pytest.raises(ValueError, match="nothing to predict"):
        model.rollout(latents[:, :1], actions[:, :0], states)
    with pytest.raises(ValueError, match=r"states have the shape \(2, 2, 2\) but must have \(2, 3, 2\)"):
        model.rollout(latents[:, :1], actions, states[:, :2])


@pytest.mark.parametrize(
    ("frozen", "changes", "text"),
    [
        ({"images": False}, {}, "model.encoder.images=true"),
        ({}, {"action_dim": 0}, "model.action_dim=0 must be at least 1"),
        ({}, {"state_dim": 0}, "model.state_dim=0 must be at least 1"),
        ({}, {"predictor_num_heads": 5}, "predictor_num_heads=5 does not divide model.predictor_dim=24"),
        ({}, {"predictor_num_heads": 6}, "3-D rotary positions need heads"),
    ],
)
def test_bad_arguments_are_refused(frozen, changes, text):
    options = {"action_dim": A, "state_dim": K, "predictor_dim": 24, "predictor_depth": 1, "predictor_num_heads": 2}
    with pytest.raises(ValueError, match=text):
        WorldModel(encoder(**frozen), **{**options, **changes})
