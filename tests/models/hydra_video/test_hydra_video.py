"""Hydra Video backbone: causality, streaming, masked tokens, and use as the encoder of every task."""

import re

import pytest
import torch
from torch import Tensor

from blueberry_video.masking import DualMasking, RandomMasking, TubeMasking
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.hydra_video.model import HydraVideo
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.optim import parameter_groups
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.distillation import Distillation
from blueberry_video.tasks.masked_pixels import MaskedPixels

SIZES = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 2, "embed_dim": 16, "depth": 2}


def tiny(**changes) -> HydraVideo:
    torch.manual_seed(0)
    return HydraVideo(**{**SIZES, "head_dim": 8, "state_dim": 8, **changes}).eval()


def clips(frames: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, frames, 16, 16, dtype=dtype)


# ---- causality and streaming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"scan_blocks": (None, (1, 1))}, {"mlp_ratio": 0, "num_groups": 2}])
def test_no_future_leakage_and_bidirectional_within_a_frame(changes):
    encoder = tiny(patch_size=4, **changes).double()
    video = clips(frames=8, batch=1, dtype=torch.float64).requires_grad_()
    mixed = (encoder(video)[0] * torch.randn(16, dtype=torch.float64)).sum(1)
    for n in (16, 27, 31):  # the first, a middle and the last token of the second of four frames
        gradient = torch.autograd.grad(mixed[n], video, retain_graph=True)[0][0]
        assert (gradient[:, 4:] == 0).all()
        per_patch = gradient.abs().view(3, 4, 2, 4, 4, 4, 4).amax(dim=(0, 2, 4, 6))[:2]  # (tubelet, row, column)
        assert per_patch.min() > 1e-8  # every patch of the frame and of the previous one


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"scan_blocks": (None, (1, 2)), "images": True, "conv_size": (2, 3, 3)}])
def test_streaming_64_frames_equals_the_whole_video(changes):
    encoder = tiny(**changes)
    video = clips(frames=64)
    whole, state, parts = encoder(video), None, []
    for frame in video.split(2, dim=2):
        features, state = encoder.stream(frame, state)
        assert features.shape == (2, 4, 16)
        parts.append(features)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    uneven, state = encoder.stream(video[:, :, :10])
    rest, _ = encoder.stream(video[:, :, 10:], state)
    torch.testing.assert_close(torch.cat([uneven, rest], 1), whole, atol=1e-4, rtol=1e-4)


def test_streaming_state_has_constant_size():
    encoder, state, sizes = tiny(), None, []
    for _ in range(12):
        features, state = encoder.stream(clips(frames=2), state)
        sizes.append(sum(part.untyped_storage().nbytes() for layer in state for part in layer))
        assert not features.requires_grad
        assert not any(part.requires_grad for layer in state for part in layer)
    assert len(set(sizes)) == 1
    assert sizes[0] == 4 * 2 * 2 * (4 * 8 * 8 + 2 * 4 * (32 + 4 * 8))  # bytes, layers, batch: scan and convolution


@torch.no_grad()
def test_last_frame_depends_on_the_first():
    encoder, video = tiny(), clips(frames=64)
    changed = video.clone()
    changed[:, :, :2] += 1.0
    assert (encoder(changed) - encoder(video))[:, -4:].abs().min() > 1e-6


def test_slowest_head_is_initialized_to_memory_frames():
    encoder = tiny(embed_dim=128, head_dim=2, memory_frames=50, scan_blocks=(None, (1, 2)))
    for block, tokens in zip(encoder.blocks, (4, 2), strict=True):
        steps = torch.nn.functional.softplus(block.mixer.dt_bias[0].detach())
        assert steps.min().item() * tokens == pytest.approx(1 / 50, rel=0.3)
        assert steps.max().item() == pytest.approx(0.1, rel=0.3)


# ---- masked tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(None,), (None, (1, 1))])
def test_output_depends_on_visible_tokens_only(blocks):
    encoder, keep = tiny(scan_blocks=blocks), torch.tensor([[0, 3, 6]])
    video = clips(batch=1)
    expected = encoder(video, keep)
    changed = video.clone()
    changed[:, :, :2, :8, 8:] += 1.0  # token 1: hidden
    assert torch.equal(encoder(changed, keep), expected)
    changed[:, :, :2, 8:, 8:] += torch.randn(8, 8)  # token 3: visible
    assert (encoder(changed, keep) - expected).abs().amax(dim=2)[0, 1] > 1e-6


@torch.no_grad()
def test_keeping_all_tokens_equals_no_mask_in_any_order():
    encoder, video, order = tiny(), clips(), torch.randperm(8).expand(2, 8)
    whole = encoder(video)
    torch.testing.assert_close(encoder(video, torch.arange(8).expand(2, 8)), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(video, order), gather_tokens(whole, order), atol=1e-5, rtol=1e-5)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_videos_of_different_lengths_and_images():
    encoder = tiny(images=True)
    assert [encoder(clips(frames)).shape[1] for frames in (2, 4, 10)] == [4, 8, 20]
    frame = clips(1)
    torch.testing.assert_close(encoder(frame), encoder(frame.expand(-1, -1, 2, -1, -1)))
    assert [tiny(tubelet_size=1)(clips(frames)).shape[1] for frames in (1, 3)] == [4, 12]  # also a clip of one frame


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 3, 5, 16, 16), r"\(3, 5, 16, 16\).*tubelet_size=2\b"),
        ((2, 3, 4, 16, 8), r"\(3, 4, 16, 8\).*C ?= ?3\b.*\(16, 16\).*image_size"),
        ((2, 1, 4, 16, 16), r"\(1, 4, 16, 16\).*C ?= ?3\b"),
        ((2, 3, 0, 16, 16), r"\(3, 0, 16, 16\).*tubelet_size=2\b"),
        ((2, 3, 1, 16, 16), r"\(3, 1, 16, 16\).*model\.encoder\.images=true"),
    ],
)
def test_invalid_video_shapes_raise(shape, text):
    with pytest.raises(ValueError, match=text):
        tiny()(torch.randn(shape))


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="keep"):
        tiny()(clips(), torch.tensor([[0, 3, 3], [1, 2, 3]]))
    with pytest.raises(ValueError, match=r"image_size=20\b.*patch_size=8\b.*\b16\b"):
        tiny(image_size=20)


# ---- mixers ----------------------------------------------------------------------------------------------------------

MIXERS = ("hydra_video", "hydra", "mamba2")
BASELINES = MIXERS[1:]


@pytest.mark.parametrize("mixer", MIXERS)
def test_receptive_field_of_each_mixer(mixer):
    encoder, video = tiny(patch_size=4, mixer=mixer).double(), clips(frames=8, batch=1, dtype=torch.float64)
    video.requires_grad_()
    mixed = (encoder(video)[0] * torch.randn(16, dtype=torch.float64)).sum(1)
    reached = []  # (output token, input token), for some output tokens of the second of four frames
    outputs = torch.tensor([16, 21, 31])
    for n in outputs:
        gradient = torch.autograd.grad(mixed[n], video, retain_graph=True)[0][0]
        reached.append(gradient.abs().view(3, 4, 2, 4, 4, 4, 4).amax(dim=(0, 2, 4, 6)).flatten())
    tokens = torch.arange(64)
    expected = {
        "hydra_video": (tokens < 32).expand(3, 64),  # all tokens of the frame and of earlier frames
        "hydra": torch.ones(3, 64, dtype=torch.bool),
        "mamba2": tokens <= outputs[:, None],
    }[mixer]
    assert (torch.stack(reached)[~expected] == 0).all()
    assert torch.stack(reached)[expected].min() > 1e-8


@torch.no_grad()
@pytest.mark.parametrize("mixer", BASELINES)
def test_keep_selects_tokens_in_raster_order(mixer):
    encoder, video, keep = tiny(mixer=mixer), clips(), torch.tensor([[0, 3, 6], [1, 2, 7]])
    expected, shuffled = encoder(video, keep), torch.tensor([2, 0, 1])
    torch.testing.assert_close(encoder(video, keep[:, shuffled]), expected[:, shuffled])
    changed = video.clone()
    changed[0, :, :2, :8, 8:] += 1.0  # token 1: hidden in the first sample
    assert torch.equal(encoder(changed, keep), expected)
    everything = torch.arange(8).expand(2, 8)
    torch.testing.assert_close(encoder(video, everything), encoder(video), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_streaming_with_mamba2_equals_the_whole_video():
    encoder, video = tiny(mixer="mamba2"), clips(frames=16)
    state, parts = None, []
    for frame in video.split(2, dim=2):
        features, state = encoder.stream(frame, state)
        parts.append(features)
    torch.testing.assert_close(torch.cat(parts, 1), encoder(video), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"state.*\(2, 4, 8, 8\).*\(1, 4, 8, 8\)"):
        encoder.stream(video[:1, :, :2], state)


def test_streaming_with_hydra_raises():
    with pytest.raises(ValueError, match=r"mixer='hydra'.*stream.*'hydra_video'.*'mamba2'"):
        tiny(mixer="hydra").stream(clips(frames=2))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 3, 6], [1, 2, 7]])])
def test_every_parameter_receives_a_gradient(mixer, keep):
    encoder = tiny(mixer=mixer)
    (encoder(clips(), keep) * torch.randn(16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mixer", BASELINES)
def test_baselines_differ_in_the_mixers_only(mixer):
    def shapes(encoder: HydraVideo) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in encoder.state_dict().items() if ".mixer." not in name}

    default, baseline = tiny(embed_dim=64, num_groups=2), tiny(embed_dim=64, num_groups=2, mixer=mixer)
    assert shapes(baseline) == shapes(default)
    sizes = [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in (baseline, default)]
    assert 0.85 < sizes[0] / sizes[1] < 1


@pytest.mark.parametrize("mixer", BASELINES)
def test_slowest_head_of_the_baselines_is_initialized_to_memory_frames(mixer):
    encoder = tiny(embed_dim=128, head_dim=2, memory_frames=5000, mixer=mixer)  # below the published floor of 1e-4
    steps = torch.nn.functional.softplus(encoder.blocks[0].mixer.dt_bias.detach())
    assert steps.min().item() * 4 == pytest.approx(1 / 5000, rel=0.3)


@pytest.mark.parametrize("mixer", BASELINES)
@pytest.mark.parametrize(
    ("key", "value"), [("conv_size", (1, 3, 3)), ("scan_orders", ("h",)), ("scan_blocks", (None, (1, 1)))]
)
def test_settings_of_hydra_video_raise_with_a_baseline(mixer, key, value):
    with pytest.raises(ValueError, match=f"{key}={re.escape(str(value))}.*mixer='{mixer}'.*mixer='hydra_video'"):
        tiny(mixer=mixer, **{key: value})
    defaults = {"conv_size": [3, 3, 3], "scan_orders": ["h", "w"], "scan_blocks": [None]}  # lists, as in a config
    assert tiny(mixer=mixer, **defaults)(clips()).shape == (2, 8, 16)


def test_unknown_mixer_raises():
    with pytest.raises(ValueError, match=r"mixer='attention'.*'hydra_video'.*'hydra'.*'mamba2'"):
        tiny(mixer="attention")


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_trains_as_a_classifier(mixer, check_training, options):
    check_training(Classification(VideoClassifier(tiny(mixer=mixer), {"motion": 8}, head_init_scale=1.0), **options))


@pytest.mark.parametrize("masking", [TubeMasking(0.5), RandomMasking(0.6), DualMasking(RandomMasking(0.5))])
@pytest.mark.parametrize("changes", [{}, {"scan_blocks": (None, (1, 1))}, {"mixer": "hydra"}, {"mixer": "mamba2"}])
def test_trains_as_a_masked_autoencoder(masking, changes, check_training, options):
    model = MaskedAutoencoder(tiny(**changes), decoder_dim=12, decoder_depth=1, decoder_num_heads=2)
    check_training(MaskedPixels(model, masking=masking, **options))


def test_trains_as_student_and_as_teacher(check_training, options):
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    models = [VideoClassifier(part, {"motion": 8}, head_init_scale=1.0) for part in (tiny(), encoder)]
    for student, teacher in (models, models[::-1]):
        student.requires_grad_(True)
        check_training(Distillation(student, **options, teacher=teacher, teacher_from="unused"))


def test_timescales_and_the_diagonal_have_no_weight_decay():
    encoder = tiny()
    matrices, rest = parameter_groups(torch.nn.ModuleDict({"encoder": encoder}))
    exempt = {id(parameter) for parameter in rest["params"]}
    names = {name for name, parameter in encoder.named_parameters() if id(parameter) in exempt}
    assert rest["weight_decay"] == 0.0
    assert {f"blocks.1.mixer.{name}" for name in ("A_log", "dt_bias", "D", "conv.bias", "norm.weight")} <= names
    decayed = {"in_proj.weight", "out_proj.weight", "fc_D.weight", "conv.weight"}
    assert not {f"blocks.1.mixer.{name}" for name in decayed} & names
    assert len(matrices["params"]) + len(rest["params"]) == len(list(encoder.parameters()))


def test_layer_decay_gives_separate_learning_rates_per_layer():
    groups = parameter_groups(VideoClassifier(tiny(), {"motion": 8}), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]


def test_own_checkpoint_loads_without_the_final_norm(tmp_path):
    trained, other = tiny(), tiny(final_norm=False)
    for parameter in trained.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {f"model.encoder.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "run.pt")
    other.load_published(tmp_path / "run.pt")
    trained.norm = torch.nn.Identity()
    video = clips()
    torch.testing.assert_close(other(video), trained(video))


@pytest.mark.parametrize(
    "keep", [torch.tensor([[1, 2]]), torch.tensor([1, 2]), torch.ones(2, 8, dtype=torch.bool), torch.rand(2, 3)]
)
def test_keep_of_wrong_shape_or_dtype_raises(keep: Tensor):
    with pytest.raises(ValueError, match=rf"keep.*{keep.dtype}.*{re.escape(str(tuple(keep.shape)))}"):
        tiny()(clips(), keep)


@pytest.mark.parametrize("mixer", MIXERS)
def test_int32_indices_and_compilation_give_the_same_output(mixer):
    encoder, video, keep = tiny(mixer=mixer), clips(), torch.tensor([[0, 3, 5], [1, 2, 7]])
    expected = encoder(video, keep)
    torch.testing.assert_close(encoder(video, keep.int()), expected, rtol=0, atol=0)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video, keep), expected, rtol=1e-5, atol=1e-5)


def test_state_of_a_different_model_raises():
    _, state = tiny().stream(clips(frames=2))
    with pytest.raises(ValueError, match=r"state.*\b2\b.*\b3\b"):
        tiny(depth=3).stream(clips(frames=2), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scan_blocks": ((3, 1),)}, "scan_blocks.*3 x 1.*2 x 2"),
        ({"scan_orders": ()}, r"scan_orders=\(\)"),
        ({"memory_frames": 0}, r"memory_frames=0\b"),
    ],
)
def test_invalid_scan_settings_raise_in_the_constructor(changes, message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    assert tiny(patch_size=16, memory_frames=1)(clips()).isfinite().all()
