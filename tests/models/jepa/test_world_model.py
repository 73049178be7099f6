"""World model: attention mask, rollout against teacher forcing, frozen parts, published weights and errors."""

import re

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.models.jepa.world_model import CONDITIONS, WorldModel, block_causal_mask
from blueberry_video.models.vit import VisionTransformer

B, T, S, D, A, K = 2, 4, 4, 12, 3, 2  # frames of 2 x 2 patches


def encoder(**changes) -> VisionTransformer:
    options = {"image_size": 16, "num_frames": 4, "patch_size": 8, "embed_dim": D, "depth": 1, "num_heads": 2}
    return VisionTransformer(**{**options, "images": True, **changes})


@pytest.fixture
def model() -> WorldModel:
    """World model with large random weights, so that every visible token affects the output."""
    built = WorldModel(encoder(), A, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2)
    for parameter in built.predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = F.layer_norm(torch.randn(B, T, S, D, dtype=dtype), (D,))
    return latents, torch.randn(B, T - 1, A, dtype=dtype), torch.randn(B, T, K, dtype=dtype)


def test_no_future_leakage(model):
    """The derivative of a prediction is exactly 0 for later inputs and nonzero for its own and earlier steps."""
    model.double()
    latents, actions, states = inputs(torch.float64)
    latents, actions, states = latents[:1], actions[:1], states[:1]
    jacobians = torch.autograd.functional.jacobian(model, (latents, actions, states))
    for by in jacobians:  # (1, T-1, S, D, 1, steps, ...)
        influence = by.abs().flatten(6).amax(dim=(0, 2, 3, 4, 6))  # (T-1, steps)
        for to in range(T - 1):
            assert (influence[to, : to + 1] > 1e-6).all()
            assert (influence[to, to + 1 :] == 0).all()


def test_attention_is_bidirectional_within_a_step(model):
    """Attention is causal between steps, not between tokens: the first patch depends on the last of its frame."""
    latents, actions, states = inputs()
    latents.requires_grad_()
    model(latents, actions, states)[0, 0, 0, 0].backward()
    assert (latents.grad[0, 0].abs().amax(dim=1) > 0).all()


def test_starts_as_copy_predicts_the_last_frame_and_trains():
    built = WorldModel(
        encoder(), A, K, predictor_dim=D + 4, predictor_depth=2, predictor_num_heads=2, starts_as_copy=True
    )
    latents, actions, states = inputs()
    predictions = built(latents, actions, states)
    torch.testing.assert_close(predictions, latents[:, :-1], atol=1e-4, rtol=0)
    (predictions - latents[:, 1:]).abs().mean().backward()
    assert all((block.attn.proj.weight.grad != 0).any() for block in built.predictor.blocks)
    with pytest.raises(ValueError, match=r"model\.starts_as_copy=true\b.*model\.predictor_dim=12\b.*\b12\b"):
        WorldModel(encoder(), A, K, predictor_dim=D, predictor_num_heads=2, starts_as_copy=True)


def test_mask_equals_a_reference_in_loops():
    tokens, first, steps = 3, 2, 2
    mask = block_causal_mask(first, steps, tokens, torch.device("cpu"))
    assert mask.shape == (steps * tokens, (first + steps) * tokens)
    for query in range(len(mask)):
        for key in range(mask.shape[1]):
            assert mask[query, key] == (key // tokens <= first + query // tokens)


def test_attention_equals_a_dense_formula(model):
    """Compares attention with rotation and mask to its definition in float64."""
    model.double()
    attention, dim, tokens = model.predictor.blocks[0].attn, 24, CONDITIONS + S
    x = torch.randn(B, 2 * tokens, dim, dtype=torch.float64)
    positions = [(t, *at) for t in range(2) for at in [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]]
    got, _ = attention(x, model.predictor._rotation(0, 2, x), block_causal_mask(0, 2, tokens, x.device))
    expected = torch.zeros_like(x)
    for b in range(B):
        for head in range(2):
            q, k, v = (part[:, 12 * head : 12 * head + 12] for part in attention.qkv(x[b]).chunk(3, dim=-1))
            q, k = (torch.stack([rotated(row, position) for row, position in zip(rows, positions)]) for rows in (q, k))
            scores = q @ k.T / 12**0.5
            for n in range(len(positions)):
                for m in range(len(positions)):
                    if positions[m][0] > positions[n][0]:
                        scores[n, m] = -torch.inf
            expected[b, :, 12 * head : 12 * head + 12] = scores.softmax(dim=1) @ v
    torch.testing.assert_close(got, attention.proj(expected), atol=1e-10, rtol=1e-10)


def rotated(row: torch.Tensor, position: tuple[int, int, int]) -> torch.Tensor:
    """Head of 12 channels, 4 per axis, as complex numbers that are rotated by position * 10000^(-i / 2)."""
    numbers = torch.view_as_complex(row.reshape(6, 2))
    angles = torch.tensor([p * 10000 ** (-i / 2) for p in position for i in range(2)], dtype=torch.float64)
    return torch.view_as_real(numbers * torch.polar(torch.ones(6, dtype=torch.float64), angles)).flatten()


def test_rollout_equals_the_definition(model):
    """The reference recomputes the whole sequence for each frame, without a KV cache; gradients are compared, too."""
    latents, actions, states = inputs()
    frames = latents[:, :1]
    for t in range(1, T):
        padded = torch.cat([frames, torch.zeros(B, 1, S, D)], dim=1)  # the last frame is not used
        frames = torch.cat([frames, model(padded, actions[:, :t], states[:, :t])[:, -1:]], dim=1)
    rolled = model.rollout(latents[:, :1], actions, states)
    torch.testing.assert_close(rolled, frames[:, 1:], atol=1e-5, rtol=1e-5)
    weights, to = list(model.predictor.parameters()), torch.randn_like(rolled)
    gradients = [torch.autograd.grad((result * to).sum(), weights) for result in (rolled, frames[:, 1:])]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_first_step_of_a_rollout_equals_teacher_forcing(model):
    latents, actions, states = inputs()
    torch.testing.assert_close(
        model.rollout(latents[:, :1], actions[:, :1], states), model(latents, actions, states)[:, :1]
    )


def test_predictions_depend_on_positions_in_time_and_space(model):
    """Swapping two frames or two patches changes the predictions; only the rotation distinguishes them."""
    latents, actions, states = inputs()
    actions, states = actions[:, :1].expand_as(actions), states[:, :1].expand_as(states)
    last = model(latents, actions, states)[:, -1]
    assert not torch.allclose(model(latents[:, [1, 0, 2, 3]], actions, states)[:, -1], last, atol=1e-4)
    order = [1, 0, 3, 2]
    assert not torch.allclose(model(latents[:, :, order], actions, states)[:, -1][:, order], last, atol=1e-4)


def test_half_precision_does_not_round_positions(model):
    exact = model.predictor._rotation(300, 2, torch.zeros(1))
    for given, dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        turn = model.predictor._rotation(300, 2, torch.zeros(1, dtype=given))
        assert turn.cos.dtype == turn.sin.dtype == dtype
        torch.testing.assert_close(turn.cos.float(), exact.cos, rtol=0, atol=1e-6)


def test_frames_are_encoded_independently_and_normalized(model):
    video = torch.randn(B, 3, T, 16, 16)
    latents = model.encode_frames(video)
    assert latents.shape == (B, T, S, D)
    torch.testing.assert_close(latents.mean(dim=-1), torch.zeros(B, T, S), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.var(dim=-1, correction=0), torch.ones(B, T, S), atol=1e-3, rtol=0)
    still = video[:, :, 2:3].expand(-1, -1, 4, -1, -1)  # a clip of that frame: its first tubelet has the same tokens
    first = model.encoder.patch_embed(still)[:, :S] + model.encoder.positions[:S]
    alone = model.encoder.norm(model.encoder.blocks[0](first))
    torch.testing.assert_close(latents[:, 2], F.layer_norm(alone, (D,)))


def test_outputs_are_read_at_the_patch_tokens():
    """Without blocks, the output of a patch depends only on that patch."""
    built = WorldModel(encoder(), A, K, predictor_dim=24, predictor_depth=0, predictor_num_heads=2)
    latents, actions, states = inputs()
    alone = built.predictor.proj(built.predictor.norm(built.predictor.embed(latents[:, :-1])))
    torch.testing.assert_close(built(latents, actions, states), F.layer_norm(alone, (D,)))


def test_predictions_are_normalized(model):
    predicted = model(*inputs())
    torch.testing.assert_close(predicted.mean(dim=-1), torch.zeros(B, T - 1, S), atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted.var(dim=-1, correction=0), torch.ones(B, T - 1, S), atol=1e-3, rtol=0)


def test_every_parameter_except_the_encoder_receives_a_gradient():
    built = WorldModel(encoder(drop_path=0.5), A, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2)
    latents, actions, states = inputs()
    (built(latents, actions, states) - latents[:, 1:]).abs().mean().backward()
    assert all(parameter.grad is not None for parameter in built.predictor.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in built.predictor.parameters())
    assert not any(parameter.requires_grad for parameter in built.encoder.parameters())
    assert not built.train().encoder.training
    assert built.predictor.training
    assert not built.encode_frames(torch.randn(1, 3, 2, 16, 16)).requires_grad


def test_longer_clips_than_in_training(model):
    latents = F.layer_norm(torch.randn(1, 9, S, D), (D,))
    assert model(latents, torch.randn(1, 8, A), torch.randn(1, 9, K)).shape == (1, 8, S, D)
    assert model.rollout(latents[:, :1], torch.randn(1, 8, A), torch.randn(1, 8, K)).shape == (1, 8, S, D)


def original(built: WorldModel) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a model in the file layout of the vjepa2 repository."""
    own = ("embed.", "blocks.", "norm.", "proj.")
    predictor = {
        f"module.{'predictor_' if name.startswith(own) else ''}{name}": value
        for name, value in built.predictor.state_dict().items()
    }
    unused = {f"module.extrinsics_encoder.{kind}": torch.zeros(24) for kind in ("weight", "bias")}
    encoder = {f"module.backbone.{name}": value for name, value in built.encoder.state_dict().items()}
    return {"encoder": encoder, "predictor": predictor | unused, "epoch": 3}


def published() -> WorldModel:
    """Tiny world model with the options of the published one."""
    frozen = encoder(qkv_bias="qkv", positions="rope_3d", rope_quirk=True, init="trunc_normal")
    return WorldModel(frozen, 5, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2, rope_quirk=True)


def test_published_weights_load_and_compute_the_same(tmp_path, capsys):
    built = published()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(original(built), tmp_path / "ac.pt")
    sizes = {"num_frames": 4, "image_size": 16, "num_heads": 2, "predictor_num_heads": 2}
    loaded = WorldModel.from_published(tmp_path / "ac.pt", False, **sizes)
    assert re.search("'encoder'.*'predictor'", capsys.readouterr().out)
    video, actions, states = torch.randn(1, 3, 3, 16, 16), torch.randn(1, 2, 5), torch.randn(1, 2, K)
    torch.testing.assert_close(loaded.encode_frames(video), built.encode_frames(video))
    latents = built.encode_frames(video)
    torch.testing.assert_close(loaded(latents, actions, states), built(latents, actions, states))
    built.predictor.rope_quirk = False
    assert not torch.allclose(loaded(latents, actions, states), built(latents, actions, states), atol=1e-3)


def test_saved_weights_round_trip_in_the_original_layout(tmp_path):
    built, loaded = published(), published()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    built.save_published(tmp_path / "ac.pt")
    content, expected = torch.load(tmp_path / "ac.pt", weights_only=True), original(built)
    assert content.keys() == {"encoder", "predictor"}
    for part, weights in content.items():
        assert weights.keys() == expected[part].keys()
    assert content["predictor"]["module.extrinsics_encoder.weight"].shape == (24, 4)
    assert re.search(r"ac\.pt.*'encoder'.*'predictor'", loaded.load_published(tmp_path / "ac.pt"))
    torch.testing.assert_close(loaded.state_dict(), built.state_dict(), rtol=0, atol=0)
    wider = WorldModel(encoder(qkv_bias="qkv"), 6, K, predictor_dim=24, predictor_depth=2, predictor_num_heads=2)
    with pytest.raises(ValueError, match=r"ac\.pt.*action_encoder\.weight \(24, 5\).*\(24, 6\)"):
        wider.load_published(tmp_path / "ac.pt")


@pytest.mark.parametrize(
    ("lost", "error", "text"),
    [
        ("encoder", ValueError, "'encoder'.*'encoder'.*'predictor'"),
        ("predictor", ValueError, "'predictor'.*'encoder'.*'predictor'"),
        ("module.action_encoder.weight", ValueError, "action_encoder.*jepa"),
        ("module.predictor_proj.bias", ValueError, r"(?i)missing.*predictor\.proj\.bias"),
    ],
)
def test_files_of_other_models_raise(tmp_path, lost, error, text):
    content = original(published())
    (content if lost in content else content["predictor"]).pop(lost)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(error, match=f"(?s){text}"):
        WorldModel.from_published(tmp_path / "other.pt", False, 4, 16, 2, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"actions": torch.zeros(B, T - 1, A + 1)}, r"actions.*\(2, 3, 4\).*\(2, 3, 3\).*model\.action_dim=3\b"),
        ({"actions": torch.zeros(B, T, A)}, r"actions.*\(2, 4, 3\).*\(2, 3, 3\).*model\.action_dim=3\b"),
        ({"states": torch.zeros(B, T, K + 1)}, r"states.*\(2, 3, 3\).*\(2, 3, 2\).*model\.state_dim=2\b"),
        ({"latents": torch.zeros(B, T, S + 1, D)}, r"latents.*\(2, 4, 5, 12\).*\(2, 4, 4, 12\)"),
        ({"latents": torch.zeros(B, 1, S, D)}, "predict.*frames.*action"),
    ],
)
def test_invalid_shapes_raise(model, changes, text):
    arguments = dict(zip(("latents", "actions", "states"), inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=text):
        model(**arguments)


def test_invalid_shapes_of_a_rollout_raise(model):
    latents, actions, states = inputs()
    with pytest.raises(ValueError, match=r"latents.*\(2, 4, 4, 12\).*\(2, 1, 4, 12\)"):
        model.rollout(latents, actions, states)
    with pytest.raises(ValueError, match=r"predict.*frames.*action"):
        model.rollout(latents[:, :1], actions[:, :0], states)
    with pytest.raises(ValueError, match=r"states.*\(2, 2, 2\).*\(2, 3, 2\).*model\.state_dim=2\b"):
        model.rollout(latents[:, :1], actions, states[:, :2])


@pytest.mark.parametrize(
    ("frozen", "changes", "text"),
    [
        ({"images": False}, {}, r"model\.encoder\.images=false.*model\.encoder\.images=true"),
        ({}, {"action_dim": 0}, r"model\.action_dim=0\b"),
        ({}, {"state_dim": 0}, r"model\.state_dim=0\b"),
        ({}, {"predictor_num_heads": 5}, r"predictor_num_heads=5\b.*model\.predictor_dim=24\b"),
        ({}, {"predictor_num_heads": 6}, r"(?i)rotary.*\b6\b.*\b4\b.*num_heads"),
    ],
)
def test_bad_arguments_raise(frozen, changes, text):
    options = {"action_dim": A, "state_dim": K, "predictor_dim": 24, "predictor_depth": 1, "predictor_num_heads": 2}
    with pytest.raises(ValueError, match=text):
        WorldModel(encoder(**frozen), **{**options, **changes})


def test_extrinsics_are_a_third_token_that_must_be_stated(tmp_path):
    """Files of both kinds have the same names, so that only ``use_extrinsics`` selects the model."""
    frozen = encoder(qkv_bias="qkv", positions="rope_3d", rope_quirk=True)
    sizes = {"predictor_dim": 24, "predictor_depth": 2, "predictor_num_heads": 2, "rope_quirk": True}
    built = WorldModel(frozen, 5, K, **sizes, use_extrinsics=True).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    built.save_published(tmp_path / "ac.pt")
    published().save_published(tmp_path / "published.pt")
    names = [torch.load(tmp_path / f"{name}.pt", weights_only=True)["predictor"].keys() for name in ("ac", "published")]
    assert names[0] == names[1]
    with pytest.raises(TypeError, match="use_extrinsics"):
        WorldModel.from_published(tmp_path / "ac.pt")
    sizes = {"num_frames": 4, "image_size": 16, "num_heads": 2, "predictor_num_heads": 2}
    loaded = WorldModel.from_published(tmp_path / "ac.pt", True, **sizes).eval()
    actions, states, cameras = (torch.randn(1, 3, width) for width in (5, K, 4))
    latents = built.encode_frames(torch.randn(1, 3, 4, 16, 16))
    predicted = loaded(latents, actions, states, cameras)
    torch.testing.assert_close(predicted, built(latents, actions, states, cameras))
    # tokens of a step: action, state, camera, patches; the camera of step 1 does not reach the prediction of step 0
    changed = loaded(latents, actions, states, torch.cat([cameras[:, :1], cameras[:, 1:] + 1], dim=1))
    torch.testing.assert_close(changed[:, 0], predicted[:, 0])
    assert not torch.allclose(changed[:, 1], predicted[:, 1], atol=1e-3)
    one = loaded.rollout(latents[:, :1], actions[:, :1], states, cameras)
    torch.testing.assert_close(one, predicted[:, :1], atol=1e-5, rtol=1e-5)
    tokens = []
    loaded.predictor.blocks[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    loaded(latents, actions, states, cameras)
    torch.testing.assert_close(tokens[0].unflatten(1, (3, -1))[:, :, 2], loaded.predictor.extrinsics_encoder(cameras))
    with pytest.raises(ValueError, match=r"model\.use_extrinsics=true.*not passed"):
        loaded(latents, actions, states)
    with pytest.raises(ValueError, match=r"model\.use_extrinsics=false"):
        published()(latents, actions, states, cameras)
