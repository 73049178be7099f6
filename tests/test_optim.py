"""Parameter groups and schedules."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import (
    constant,
    cosine_ramp,
    exponential,
    parameter_groups,
    ramp,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)

DECAYING = [warmup_cosine, warmup_linear, warmup_stable_decay]
SCHEDULES = [constant, *DECAYING]


def encoder() -> VisionTransformer:
    return VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)


def names(module: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in module.named_parameters() if id(parameter) in chosen}


def test_weight_decay_applies_to_matrices_only():
    model = MaskedAutoencoder(encoder(), decoder_dim=12, decoder_depth=1, decoder_num_heads=2)
    matrices, rest = parameter_groups(model)
    assert "weight_decay" not in matrices  # defaults to that of the optimizer
    assert rest["weight_decay"] == 0.0
    layers = ("qkv", "proj", "fc1", "fc2", "head", "encoder_to_decoder")
    expected = {name for name, _ in model.named_parameters() if name.endswith(tuple(f"{x}.weight" for x in layers))}
    assert names(model, matrices) == expected
    assert "encoder.patch_embed.proj.weight" in expected
    assert names(model, rest) == {name for name, _ in model.named_parameters()} - expected
    assert {"mask_token", "encoder.norm.weight", "encoder.blocks.0.attn.q_bias"} <= names(model, rest)


def test_no_weight_decay_of_a_submodule_applies_to_the_full_name():
    model = VideoClassifier(encoder(), {"motion": 8}, pooling="attentive", num_heads=2, published_pool=False)
    matrices, rest = parameter_groups(model)
    assert "head.pool.query" in names(model, rest)
    assert "head.pool.q.weight" in names(model, matrices)


def test_frozen_parameters_are_left_out():
    model = VideoClassifier(encoder(), {"motion": 8}, freeze_encoder=True)
    groups = parameter_groups(model)
    assert set.union(*(names(model, group) for group in groups)) == {
        "head.fc_norm.weight",
        "head.fc_norm.bias",
        "head.linear.motion.weight",
        "head.linear.motion.bias",
    }


def test_no_parameter_is_in_two_groups_or_lost():
    model = MaskedAutoencoder(encoder(), decoder_dim=12, decoder_depth=1, decoder_num_heads=2)
    chosen = [id(parameter) for group in parameter_groups(model) for parameter in group["params"]]
    assert sorted(chosen) == sorted(id(parameter) for parameter in model.parameters())


def test_weight_decay_changes_matrices_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name == "0.weight" else 1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 400), warmup=st.floats(0, 0.5))
def test_schedules_warm_up_linearly_to_one_and_do_not_rise_again(schedule, total, warmup):
    values = [schedule(step, total, warmup=warmup) for step in range(total)]
    rising = round(warmup * total)
    assert values[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert all(0 <= value <= 1 for value in values)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values[rising:]))
    if rising < total:
        assert values[rising] == 1.0  # continuous: the decay starts at 1


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("total", [20, 21, 1000])
def test_the_last_step_has_the_final_multiplier(schedule, final, total):
    values = [schedule(step, total, warmup=0.1, final=final) for step in range(total)]
    assert values[-1] == pytest.approx(final)
    assert min(values[round(0.1 * total) :]) == pytest.approx(final)


@pytest.mark.parametrize("schedule", DECAYING)
def test_schedules_have_no_jumps(schedule):
    total = 1000
    values = [schedule(step, total, warmup=0.1) for step in range(total)]
    steepest = max(abs(b - a) for a, b in itertools.pairwise(values))
    assert steepest <= 0.0101  # the slope of the warm-up, 1 / 100


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_has_multiplier_one(schedule):
    assert schedule(0, 1) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_of_a_warm_up_is_not_zero(schedule):
    assert schedule(0, 100, warmup=0.1) == pytest.approx(0.1)


def test_schedules_have_known_values():
    assert constant(70, 100, warmup=0.1) == 1.0
    # progress 0.5 is step 55 of 10 … 100
    assert warmup_cosine(55, 101, warmup=0.1) == pytest.approx(0.5)
    assert warmup_linear(55, 101, warmup=0.1, final=0.2) == pytest.approx(0.6)
    assert warmup_cosine(32, 101, warmup=0.1) > warmup_linear(32, 101, warmup=0.1)
    assert warmup_stable_decay(79, 101, warmup=0.1, decay=0.2) == 1.0
    assert warmup_stable_decay(90, 101, warmup=0.1, decay=0.2) == pytest.approx(10 / 19, abs=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_scale_with_the_length_of_the_run(schedule):
    short, long = ([schedule(step, total, warmup=0.1) for step in range(total)] for total in (100, 10_000))
    assert max(abs(long[100 * step + 50] - short[step]) for step in range(100)) < 0.06


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_begins_at_start(schedule):
    values = [schedule(step, 100, warmup=0.1, start=0.2) for step in range(12)]
    assert values[:10] == pytest.approx([0.2 + 0.08 * (step + 1) for step in range(10)])
    assert values[10] == 1.0
    for key, value in (("start", 1.5), ("warmup", -0.1)):
        with pytest.raises(ValueError, match=rf"schedule\.{key}={value}"):
            schedule(0, 100, **{key: value})


def test_a_stretched_cosine_is_that_of_a_longer_run_truncated():
    """V-JEPA: the first 90,000 steps of a cosine over 112,500, with 12,000 steps of warm-up."""
    total, options = 90_000, {"final": 0.0016, "start": 0.32}
    for step in (0, 11_999, 12_000, 50_000, 89_999):
        stretched = warmup_cosine(step, total, warmup=12 / 90, stretch=1.25, **options)
        assert stretched == pytest.approx(warmup_cosine(step, 112_500, warmup=12 / 112.5, **options), abs=1e-12)
    published = 0.0016 + 0.9984 * 0.5 * (1 + math.cos(math.pi * (90_000 - 12_000) / (112_500 - 12_000)))
    assert stretched == pytest.approx(published, abs=1e-4)


def test_stretched_ramps_stop_before_their_end():
    total = 90_000
    momentum = [ramp(step, total, start=0.998, end=1.0, stretch=1.25) for step in range(0, total, 1000)]
    assert momentum == pytest.approx([0.998 + 0.002 * step / 112_500 for step in range(0, total, 1000)], abs=1e-7)
    assert ramp(total - 1, total, start=0.998, end=1.0) == 1.0
    assert {ramp(step, 10, start=0.99925, end=0.99925, stretch=1.25) for step in range(10)} == {0.99925}
    decay = [cosine_ramp(step, total, start=0.04, end=0.4, stretch=1.25) for step in (0, 56_250, total - 1)]
    assert decay[0] == 0.04
    assert decay[1] == pytest.approx(0.22, abs=1e-5)
    assert decay[2] == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * 0.8)), abs=1e-4)
    assert cosine_ramp(total - 1, total, start=0.04, end=0.4) == pytest.approx(0.4)


@pytest.mark.parametrize("schedule", [warmup_cosine, ramp, cosine_ramp])
def test_stretch_below_one_raises(schedule):
    ends = {} if schedule is warmup_cosine else {"start": 0.0, "end": 1.0}
    with pytest.raises(ValueError, match=r"stretch=0\.8\b"):
        schedule(5, 10, stretch=0.8, **ends)


def deep(depth: int, **changes) -> VideoClassifier:
    vit = VisionTransformer(16, 4, 8, 2, embed_dim=4, depth=depth, num_heads=1)
    return VideoClassifier(vit, {"motion": 8}, **changes)


def scale_of(module: nn.Module, layer_decay: float) -> dict[str, float]:
    found = {id(p): group["lr_scale"] for group in parameter_groups(module, layer_decay) for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in module.named_parameters()}


def test_layer_decay_lowers_the_learning_rate_towards_the_input():
    """Layer assignment of BEiT and VideoMAE, with the depth of ViT-B and its published decay."""
    for name, scale in scale_of(deep(12), 0.75).items():
        if name.startswith("encoder.patch_embed."):
            assert scale == 0.75**13, name
        elif name.startswith("encoder.blocks."):
            assert scale == 0.75 ** (12 - int(name.split(".")[2])), name
        else:
            assert scale == 1.0, name
            assert name.startswith(("encoder.norm.", "head.")), name


def test_layer_decay_does_not_change_which_parameters_decay():
    model = deep(3, pooling="attentive")
    groups, plain = parameter_groups(model, 0.9), parameter_groups(model)
    assert len(plain) == 2
    assert [group["lr_scale"] for group in plain] == [1.0, 1.0]
    assert [group["lr_scale"] for group in groups] == [scale for n in range(5) for scale in 2 * [0.9**n]]
    for decays, whole in ((True, plain[0]), (False, plain[1])):
        parts = [names(model, group) for group in groups if ("weight_decay" not in group) == decays]
        assert set.union(*parts) == names(model, whole)
        assert sum(map(len, parts)) == len(whole["params"])


def test_parameters_before_the_blocks_of_an_encoder_are_layer_0():
    model = deep(2)
    model.encoder.class_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.encoder.last = nn.Linear(4, 4)
    scales = scale_of(nn.ModuleDict({"model": model, "adapter": nn.Linear(2, 2)}), 0.5)
    assert scales["model.encoder.class_token"] == 0.5**3
    assert scales["model.encoder.blocks.0.norm1.bias"] == 0.5**2
    assert scales["model.encoder.last.weight"] == scales["adapter.weight"] == 1.0


def test_frozen_layers_still_count_as_layers():
    model = deep(2)
    model.encoder.requires_grad_(False)
    model.encoder.blocks[0].requires_grad_(True)
    assert {group["lr_scale"] for group in parameter_groups(model, 0.5) if group["params"]} == {1.0, 0.5**2}


def test_layer_decay_without_blocks_raises():
    with pytest.raises(ValueError, match=r"(?s)task\.optimization\.layer_decay=0\.75\b.*\bLinear\b.*encoder\.blocks"):
        parameter_groups(nn.Linear(2, 2), 0.75)
    assert len(parameter_groups(nn.Linear(2, 2))) == 2


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_layer_decay_out_of_range_raises(decay):
    with pytest.raises(ValueError, match=rf"task\.optimization\.layer_decay={decay}\b.*\(0, 1\]"):
        parameter_groups(deep(1), decay)


def test_exponential_is_linear_in_the_logarithm():
    values = [exponential(step, 5, final=0.0001) for step in range(5)]
    assert values == pytest.approx([1, 0.1, 0.01, 0.001, 0.0001])
    with pytest.raises(ValueError, match=r"schedule\.final=0"):
        exponential(0, 5, final=0)


# The rules of the published schedules, written with their own counters: V-JEPA counts before it steps, so that step i
# (from 0) has the counter i + 1; its momentum and the schedules of VideoMAE are tables that begin with step 0.


@pytest.mark.parametrize("warmup_steps", [0, 12])
def test_v_jepa_learning_rates_are_exact_at_every_step(warmup_steps):
    total, anneal, start, peak, final = 90, 20, 0.2, 1.0, 0.016
    options = {"warmup": warmup_steps / total, "start": start, "final": final, "counting": "after"}
    stretched = round(1.25 * total)
    for step in range(total):
        count = step + 1
        rising = count < warmup_steps
        warm = start + count / max(warmup_steps, 1) * (peak - start)
        cosine = (count - warmup_steps) / (stretched - warmup_steps)
        cosine = final + (peak - final) * 0.5 * (1 + math.cos(math.pi * cosine))
        assert warmup_cosine(step, total, **options, stretch=1.25) == pytest.approx(
            warm if rising else cosine, abs=1e-12
        )
        falling = max(count - (total - anneal), 0) / anneal
        stable = warm if rising else peak + falling * (final - peak)
        assert warmup_stable_decay(step, total, **options, decay=anneal / total) == pytest.approx(stable, abs=1e-12)
        linear = peak + count / total * (final - peak)
        cooled = warmup_linear(step, total, warmup=0.0, final=final, counting="after")
        assert cooled == pytest.approx(linear, abs=1e-12)


def test_v_jepa_weight_decay_and_momentum_are_exact_at_every_step():
    total, stretched = 80, 100
    for step in range(total):
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / stretched))
        decay = cosine_ramp(step, total, start=0.04, end=0.4, stretch=1.25, counting="after")
        assert decay == pytest.approx(0.4 + (0.04 - 0.4) * cosine, abs=1e-12)
        momentum = ramp(step, total, start=0.998, end=1.0, stretch=1.25, counting="before")
        assert momentum == pytest.approx(0.998 + step * (1.0 - 0.998) / stretched, abs=1e-12)


def test_videomae_learning_rates_are_exact_at_every_step():
    """numpy.linspace from the start to the peak, then half a cosine over the remaining steps."""
    total, warmup_steps, start, final = 100, 10, 0.1, 0.02
    table = [start + (1 - start) * step / (warmup_steps - 1) for step in range(warmup_steps)]
    rest = total - warmup_steps
    table += [final + 0.5 * (1 - final) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    options = {"warmup": 0.1, "start": start, "final": final, "counting": "before"}
    assert [warmup_cosine(step, total, **options) for step in range(total)] == pytest.approx(table, abs=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [625, 1201])
@pytest.mark.parametrize(
    ("experiment", "epochs", "warmup_epochs", "lr", "min_lr"),
    [
        ("videomae_k400", 800, 40, 1.5e-4, 1e-5),
        ("videomae_finetune_k400", 75, 5, 5e-4, 1e-6),
        ("videomae_v2_pretrain", 300, 30, 6e-4, 1e-5),
        ("videomae_v2_intermediate", 35, 5, 1e-3, 1e-6),
        ("videomae_v2_finetune", 3, 1, 1e-5, 1e-6),
        ("videomae_v2_distill", 100, 5, 5e-4, 1e-6),
    ],
)
def test_recipes_of_videomae_have_the_learning_rate_of_the_original_loop(
    experiment, epochs, warmup_epochs, lr, min_lr, steps_per_epoch
):
    """The loop sets the rate of step ``epoch * steps_per_epoch + i`` from a table over all steps: a line from 0 to the
    peak over the epochs of warm-up, both ends included, then half a cosine that would reach ``min_lr`` one step after
    the last."""
    root = Path(__file__).resolve().parents[1]
    config = yaml.safe_load((root / "experiments" / experiment / "config.yaml").read_text())
    optimizer = "finetune" if {"override optimizer": "finetune"} in config["defaults"] else "videomae"
    peaks = yaml.safe_load((root / "conf" / "optimizer" / f"{optimizer}.yaml").read_text()) | config.get(
        "optimizer", {}
    )
    assert (config["trainer"]["max_epochs"], peaks["lr"]) == (epochs, lr)
    total, rising = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    table = [lr * step / (rising - 1) for step in range(rising)]
    for step in range(total - rising):
        table.append(min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / (total - rising))))
    steps = sorted({*range(0, total, 97), *range(rising - 3, rising + 3), total - 2, total - 1})
    rates = [lr * warmup_cosine(step, total, **config["schedule"]) for step in steps]
    assert rates == pytest.approx([table[step] for step in steps], abs=1e-8 * lr)


def test_unknown_counting_raises():
    with pytest.raises(ValueError, match="counting='late'"):
        warmup_cosine(50, 100, counting="late")


def test_decays_head_multiplies_every_layer_once_more():
    """OmniMAE: layer l of depth d has decay ** (d + 2 - l), so that the head has one factor."""
    model = VideoClassifier(encoder(), {"motion": 8})
    plain, more = parameter_groups(model, 0.5), parameter_groups(model, 0.5, decays_head=True)
    assert [group["lr_scale"] for group in more] == [0.5 * group["lr_scale"] for group in plain]
    assert more[0]["lr_scale"] == 0.5
    assert [len(group["params"]) for group in more] == [len(group["params"]) for group in plain]
