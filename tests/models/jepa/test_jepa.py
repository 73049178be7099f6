"""V-JEPA and V-JEPA 2: properties that follow from their definition, and errors."""

import re

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm

from blueberry_video.config import CONF
from blueberry_video.masking import MultiBlockMasking
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa import convert
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.nn.positions import sincos_3d_table

KINDS = ("sincos_3d", "rope_3d")
GRID = (2, 4, 4)
SIZES = {"image_size": 16, "num_frames": 4, "patch_size": 4, "tubelet_size": 2, "embed_dim": 24, "num_heads": 2}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def encoder(positions: str, **changes) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"depth": 2, "qkv_bias": "qkv", "positions": positions}
    return VisionTransformer(**(SIZES | options | changes))


def model(positions: str = "rope_3d", **changes) -> JEPA:
    """JEPA with noise added to the small initial weights of the predictor, so that every parameter matters."""
    model = JEPA(encoder(positions), 12, 2, 2, predictor_positions=positions, **changes)
    with torch.no_grad():
        for parameter in model.predictor.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def masks() -> tuple[Tensor, Tensor]:
    return MultiBlockMasking(2, 0.4)(2, GRID, torch.Generator().manual_seed(0))[:2]


def video(*shape: int) -> Tensor:
    return torch.randn(2, 3, *(shape or (4, 16, 16)), generator=torch.Generator().manual_seed(1))


# ---- the encoder's positions -----------------------------------------------------------------------------------------


def test_without_blocks_v_jepa_adds_its_table_and_v_jepa_2_adds_nothing():
    for positions in KINDS:
        bare = encoder(positions, depth=0, final_norm=False)
        table = sincos_3d_table(GRID, 24) if positions == "sincos_3d" else torch.zeros(32, 24)
        torch.testing.assert_close(bare(video()), bare.patch_embed(video()) + table)
        assert not any("positions" in name or "rope" in name for name in bare.state_dict())


@pytest.mark.parametrize("positions", KINDS)
def test_keeping_all_tokens_equals_no_mask_in_any_order(positions):
    model, order = encoder(positions), torch.randperm(32)
    torch.testing.assert_close(model(video(), torch.arange(32).expand(2, -1)), model(video()), **TOLERANCE)
    torch.testing.assert_close(model(video(), order.expand(2, -1)), model(video())[:, order], **TOLERANCE)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("positions", KINDS)
def test_features_depend_on_the_distance_of_tokens_along_each_axis(positions, axis):
    one, other = torch.randn(2, 3, 2, 4, 4)
    features = []
    for distance in (1, 2):
        clip = torch.zeros(1, 3, 6, 16, 16)
        clip[0, :, :2, :4, :4] = one
        t, h, w = (distance * size if axis == i else 0 for i, size in enumerate((2, 4, 4)))
        clip[0, :, t : t + 2, h : h + 4, w : w + 4] = other
        keep = torch.tensor([[0, distance * (16, 4, 1)[axis]]])
        features.append(encoder(positions)(clip, keep))
    assert (features[0] - features[1]).abs().amax(dim=2).min() > 1e-3  # of both tokens


@pytest.mark.parametrize("shape", [(8, 16, 16), (2, 16, 16), (4, 24, 8), (6, 20, 12)])
def test_clips_of_different_sizes_get_the_interpolated_table(shape):
    bare = encoder("sincos_3d", depth=0, final_norm=False)
    clip, grid = video(*shape), bare.grid(shape)
    table = sincos_3d_table(GRID, 24).T.reshape(1, 24, *GRID)
    factors = tuple(new / old for new, old in zip(grid, GRID))
    expected = interpolate(table, scale_factor=factors, mode="trilinear").flatten(2)[0].T
    torch.testing.assert_close(bare(clip), bare.patch_embed(clip) + expected, **TOLERANCE)
    keep = torch.tensor([[0, 3], [2, 5]])
    torch.testing.assert_close(bare(clip, keep), gather_tokens(bare(clip), keep), **TOLERANCE)


@pytest.mark.parametrize("shape", [(8, 16, 16), (4, 24, 8)])
def test_rotary_positions_of_different_sizes_equal_an_encoder_built_for_them(shape):
    frames, height, width = shape
    ours, clip = encoder("rope_3d"), video(*shape)
    if height == width:
        other = encoder("rope_3d", num_frames=frames)
        assert torch.equal(ours(clip), other(clip))
    longer = torch.cat([clip, clip], dim=2)
    seen = torch.arange(ours(clip).shape[1]).expand(2, -1)  # the first tokens of a longer clip have the same positions
    torch.testing.assert_close(ours(longer, seen), ours(clip), **TOLERANCE)


@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize(
    "shape", [(3, 3, 16, 16), (3, 4, 18, 16), (3, 4, 16, 3), (3, 1, 16, 16), (3, 0, 16, 16), (1, 4, 16, 16)]
)
def test_invalid_video_shapes_raise(positions, shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\b3\b.*\(2, 4, 4\)"):
        encoder(positions)(torch.zeros(1, *shape))


@pytest.mark.parametrize("positions", KINDS)
def test_single_frame_has_the_positions_of_the_first_tokens(positions):
    images = encoder(positions, images=True)
    frame = video(1, 16, 16)
    still = frame.repeat(1, 1, 4, 1, 1)
    torch.testing.assert_close(images(frame), images(still, torch.arange(16).expand(2, -1)), **TOLERANCE)
    assert images(video(1, 24, 24)).shape == (2, 36, 24)


def test_unknown_positions_and_initializations_raise():
    with pytest.raises(ValueError, match=r"positions='rope'.*'sinusoid'.*'sincos_3d'.*'rope_3d'"):
        encoder("rope")
    with pytest.raises(ValueError, match=r"init='zeros'.*'xavier'.*'trunc_normal'"):
        encoder("rope_3d", init="zeros")
    with pytest.raises(ValueError, match=r"positions='sinusoid'.*'sincos_3d'.*'rope_3d'"):
        Predictor(24, GRID, 12, 1, 2, positions="sinusoid")


# ---- the predictor ---------------------------------------------------------------------------------------------------


def test_v_jepa_2_sorts_tokens_by_position_and_v_jepa_does_not():
    keep, target = torch.tensor([[3, 20, 7]]), torch.tensor([[31, 0, 8]])
    for positions, order in (("rope_3d", [0, 3, 7, 8, 20, 31]), ("sincos_3d", [3, 20, 7, 31, 0, 8])):
        predictor, seen = Predictor(24, GRID, 12, 1, 2, positions=positions), []
        nn.init.eye_(predictor.embed.weight)
        predictor.blocks[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        context = torch.zeros(1, 3, 24)
        context[0, :, 0] = torch.tensor([103.0, 120.0, 107.0])  # 100 + the position of each token
        predictor(context, keep, target)
        marks = [100.0 + position if position in (3, 7, 20) else 0.0 for position in order]
        assert seen[0][0, :, 0].tolist() == pytest.approx(marks, abs=1.01)  # a position embedding adds up to 1


def test_each_kind_of_mask_has_a_mask_token_initialized_to_zero():
    assert torch.equal(Predictor(24, GRID, 12, 2, 2, num_mask_tokens=3).mask_tokens, torch.zeros(3, 12))
    jepa, (keep, target) = model(num_mask_tokens=3), masks()
    with torch.no_grad():
        jepa.predictor.mask_tokens[2] = jepa.predictor.mask_tokens[0]
    zeroth, first, second = (jepa(video(), keep, target, i) for i in range(3))
    assert torch.equal(zeroth, second)
    assert (zeroth - first).abs().max() > 0.01


@pytest.mark.parametrize("positions", KINDS)
def test_visible_tokens_have_a_separate_projection(positions):
    """The projection reads the outputs at the visible tokens, not at mask tokens in their positions (V-JEPA 2.1)."""
    predictor, (keep, target) = model(positions, predictor_context=True).predictor.eval(), masks()
    context = torch.randn(*keep.shape, 24)
    hidden, visible = predictor.both(context, keep, target)
    tokens = predictor._run(context, keep, target, 0, None)
    torch.testing.assert_close(visible, predictor.proj_context(predictor.norm(tokens))[:, : keep.shape[1]])
    torch.testing.assert_close(hidden, predictor(context, keep, target), **TOLERANCE)
    moved = predictor.both(context.roll(1, dims=1), keep.roll(1, dims=1), target)
    torch.testing.assert_close(moved[1].roll(-1, dims=1), visible, **TOLERANCE)  # each output belongs to its token
    assert model(positions).predictor.both(context, keep, target)[1] is None


def test_several_levels_are_projected_by_a_two_layer_mlp():
    predictor, context = Predictor(48, GRID, 12, 1, 2, levels=2), torch.randn(2, 3, 48)
    hidden = torch.nn.functional.gelu(context @ predictor.embed[0].weight.T + predictor.embed[0].bias)
    assert hidden.shape == (2, 3, 24)
    expected = hidden @ predictor.embed[2].weight.T + predictor.embed[2].bias
    torch.testing.assert_close(predictor.embed(context), expected)


@pytest.mark.parametrize("mask_index", [2, -1])
def test_mask_index_without_a_mask_token_raises(mask_index):
    with pytest.raises(ValueError, match=rf"mask_index={mask_index}\b.*\b2\b.*model\.num_mask_tokens"):
        model()(video(), *masks(), mask_index)


def test_empty_context_raises():
    nothing, everything = torch.zeros(2, 0, dtype=torch.long), torch.arange(32).expand(2, -1)
    for positions in KINDS:
        with pytest.raises(ValueError, match=r"context"):
            model(positions)(video(), nothing, everything)


def test_zero_mask_tokens_raise():
    with pytest.raises(ValueError, match=r"num_mask_tokens=0\b"):
        model(num_mask_tokens=0)


@pytest.mark.parametrize("shape", [(8, 16, 16), (4, 24, 8)])
def test_predictor_positions_follow_the_grid_of_the_clip(shape):
    (t, h, w), keep, target = encoder("rope_3d").grid(shape), torch.tensor([[0, 7, 9]]), torch.tensor([[4, 11]])
    context = torch.randn(1, 3, 24)
    for positions in KINDS:
        torch.manual_seed(0)
        ours = Predictor(24, GRID, 12, 2, 2, positions=positions)
        torch.manual_seed(0)
        other = Predictor(24, (t, h, w), 12, 2, 2, positions=positions)
        if positions == "sincos_3d":
            table = sincos_3d_table(GRID, 12).T.reshape(1, 12, *GRID)
            other.positions = interpolate(table, size=(t, h, w), mode="trilinear").flatten(2)[0].T
        expected = other(context, keep, target)
        torch.testing.assert_close(ours(context, keep, target, grid=(t, h, w)), expected, **TOLERANCE)
    whole = model()
    clip = torch.cat([video(*shape)] * 2)[:1]
    expected = whole.predictor(whole.encoder(clip, keep), keep, target, 0, (t, h, w))
    assert torch.equal(whole(clip, keep, target), expected)


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", KINDS)
def test_targets_are_normalized_features_of_the_whole_clip_without_gradient(positions):
    jepa = model(positions)
    targets = jepa.targets(video())
    assert targets.shape == (2, 32, 24)
    assert not targets.requires_grad
    torch.testing.assert_close(targets.mean(dim=-1), torch.zeros(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.var(dim=-1, unbiased=False), torch.ones(2, 32), atol=1e-3, rtol=0)
    torch.testing.assert_close(targets, layer_norm(jepa.target_encoder(video()), (24,)))
    with torch.no_grad():
        jepa.encoder.norm.weight.zero_()  # the targets do not depend on the encoder
    assert torch.equal(jepa.targets(video()), targets)


def test_target_encoder_stays_in_eval_mode_during_training():
    jepa = JEPA(encoder("rope_3d", drop_path=0.9), 12, 1, 2).train()
    assert jepa.encoder.training
    assert not any(module.training for module in jepa.target_encoder.modules())
    assert torch.equal(jepa.targets(video()), jepa.targets(video()))


@pytest.mark.parametrize("positions", KINDS)
def test_every_parameter_except_the_target_encoder_receives_a_gradient(positions):
    jepa, (keep, target) = model(positions), masks()
    truth = gather_tokens(jepa.targets(video()), target)
    sum((jepa(video(), keep, target, i) - truth).abs().mean() for i in range(2)).backward()
    without = {name for name, parameter in jepa.named_parameters() if parameter.grad is None}
    assert without == {f"target_encoder.{name}" for name, _ in jepa.target_encoder.named_parameters()}
    assert not any(parameter.requires_grad for parameter in jepa.target_encoder.parameters())


def test_target_encoder_is_the_ema_of_the_encoder():
    jepa = model()
    start = {name: value.clone() for name, value in jepa.encoder.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in jepa.target_encoder.state_dict().items())
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    now = jepa.encoder.state_dict()
    jepa.update_target(1.0)
    assert all(torch.equal(value, start[name]) for name, value in jepa.target_encoder.state_dict().items())
    jepa.update_target(0.75)
    for name, value in jepa.target_encoder.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * now[name])
    jepa.update_target(0.0)
    assert all(torch.equal(value, now[name]) for name, value in jepa.target_encoder.state_dict().items())


@pytest.mark.parametrize("momentum", [-0.01, 1.01, float("nan")])
def test_momentum_out_of_range_raises(momentum):
    with pytest.raises(ValueError, match=rf"momentum.*{momentum}.*\[0, 1\]"):
        model().update_target(momentum)


def test_without_ema_targets_come_from_the_encoder_with_an_optional_gradient():
    jepa = model(ema=False)
    assert jepa.target_encoder is None
    assert not any(name.startswith("target_encoder") for name in jepa.state_dict())
    torch.testing.assert_close(jepa.targets(video()), layer_norm(jepa.encoder(video()), (24,)))
    assert not jepa.targets(video()).requires_grad
    jepa.targets(video(), gradient=True).square().sum().backward()
    assert jepa.encoder.patch_embed.proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert not jepa.targets(video(), gradient=True).requires_grad
    with pytest.raises(ValueError, match=r"model\.ema=true"):
        jepa.update_target(0.9)


def test_teacher_targets_have_its_width_and_the_teacher_is_frozen():
    teacher = encoder("sincos_3d", embed_dim=16)
    jepa, (keep, target) = model(ema=False, teacher=teacher), masks()
    assert jepa.targets(video()).shape == (2, 32, 16)
    predicted = jepa(video(), keep, target)
    assert predicted.shape == (*target.shape, 16)
    predicted.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(ValueError, match=r"model\.ema=true"):
        jepa.update_target(0.9)
    with pytest.raises(ValueError, match=r"model\.ema=true.*model\.teacher.*model\.ema=false"):
        model(teacher=teacher)
    with pytest.raises(ValueError, match=r"teacher.*\(2, 8, 8\).*\(2, 4, 4\)"):
        model(ema=False, teacher=encoder("rope_3d", patch_size=8))


class PatchMeans(Encoder):
    """Minimal implementation of the encoder contract."""

    def __init__(self):
        super().__init__(16, 4, 4, 2, 24)
        self.linear = nn.Linear(96, 24)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        patches = video.unflatten(4, (4, 4)).unflatten(3, (4, 4)).unflatten(2, (2, 2))
        tokens = self.linear(patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))
        return tokens if keep is None else gather_tokens(tokens, keep)


@pytest.mark.parametrize("positions", KINDS)
def test_any_encoder_works(positions):
    jepa, (keep, target) = JEPA(PatchMeans(), 12, 1, 2, predictor_positions=positions), masks()
    assert jepa(video(), keep, target).shape == jepa.targets(video())[:, : target.shape[1]].shape


# ---- anticipation ----------------------------------------------------------------------------------------------------


def test_future_tokens_are_predicted_after_the_end_of_the_clip():
    jepa = model().eval()
    seen = jepa.encoder(video())
    future = jepa.predictor.ahead(seen, GRID, skip=2, length=3, mask_index=1)
    positions = torch.arange((2 + 2) * 16, (2 + 2 + 3) * 16).expand(2, -1)
    expected = jepa.predictor(seen, torch.arange(32).expand(2, -1), positions, 1, (99, 4, 4))
    torch.testing.assert_close(future, expected, **TOLERANCE)
    later = jepa.predictor.ahead(seen, GRID, skip=6, length=3, mask_index=1)
    assert (later - future).abs().max() > 0.01
    mixed = jepa.predictor.ahead(seen, GRID, torch.tensor([2, 6]), length=3, mask_index=1)
    torch.testing.assert_close(mixed, torch.stack([future[0], later[1]]), **TOLERANCE)


def test_invalid_future_raises():
    seen = torch.zeros(2, 32, 24)
    with pytest.raises(ValueError, match="predictor_positions='rope_3d'"):
        model("sincos_3d").predictor.ahead(seen, GRID)
    for skip, length in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=rf"skip={skip}\b.*length={length}\b"):
            model().predictor.ahead(seen, GRID, skip, length)
    for skip in (0.5, torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"skip.*torch\.(float32|int64).*\(\d?,?\).*\b2\b"):
            model().predictor.ahead(seen, GRID, skip)


# ---- configs and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder_millions", "head_dim"),
    [
        ("vjepa/large", 304, 64),
        ("vjepa/huge", 632, 80),
        ("vjepa2/large", 304, 64),
        ("vjepa2/huge", 632, 80),
        ("vjepa2/giant", 1012, 64),
        ("vjepa2/giant_384", 1012, 64),
    ],
)
def test_published_sizes(name, encoder_millions, head_dim):
    config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    config.encoder = OmegaConf.load(CONF / "model" / f"{config.pop('defaults')[0]['/model@encoder']}.yaml")
    with torch.device("meta"):
        jepa = instantiate(config)
    encoder, predictor = jepa.encoder, jepa.predictor
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == encoder_millions
    assert round(sum(p.numel() for p in predictor.parameters()) / 1e6) == 22
    assert encoder.embed_dim // encoder.blocks[0].attn.num_heads == head_dim
    heads = encoder.blocks[0].attn.num_heads if name.startswith("vjepa/") else 12
    assert (predictor.blocks[0].attn.num_heads, len(predictor.blocks)) == (heads, 12)
    assert (encoder.rope is not None) == (predictor.rope is not None) == name.startswith("vjepa2")


@pytest.mark.parametrize("positions", KINDS)
def test_own_checkpoint_initializes_an_encoder(tmp_path, positions):
    trained, fresh = model(positions), encoder(positions)
    nn.init.normal_(trained.encoder.norm.bias)
    torch.save({"state_dict": {f"model.{name}": w for name, w in trained.state_dict().items()}}, tmp_path / "run.ckpt")
    fresh.load_published(tmp_path / "run.ckpt")
    assert torch.equal(fresh(video()), trained.encoder(video()))


def test_published_files_with_several_networks_raise_in_load_encoder(tmp_path):
    torch.save(convert.to_original(model().state_dict()), tmp_path / "vitl.pt")
    with pytest.raises(ValueError, match=r"(?s)vitl\.pt.*V-JEPA.*\.jepa\."):
        encoder("rope_3d").load_published(tmp_path / "vitl.pt")
    torch.save(convert.to_huggingface(model().state_dict()), tmp_path / "hf.pt")
    with pytest.raises(ValueError, match=r"(?s)encoder.*predictor.*V-JEPA.*\.jepa\."):
        encoder("rope_3d").load_published(tmp_path / "hf.pt")


def test_encoder_of_a_published_file_loads_from_its_state_dict(tmp_path):
    torch.save(convert.to_original(model().state_dict()), tmp_path / "vitl.pt")
    sizes = {"num_frames": 4, "image_size": 16, "num_heads": 2, "predictor_num_heads": 2}
    read = JEPA.from_published(tmp_path / "vitl.pt", "target_encoder", positions="rope_3d", **sizes)
    torch.save(read.encoder.state_dict(), tmp_path / "encoder.pt")
    fresh = encoder("rope_3d", rope_quirk=True)
    fresh.load_published(tmp_path / "encoder.pt")
    assert torch.equal(fresh(video()), read.encoder(video()))
