"""Hydra Video generator: teacher forcing, causality, streaming, cached evaluation, conditioning, parameters, errors."""

import pytest
import torch
from torch import Tensor

from blueberry_video.models.hydra_video.chunks import Chunks
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.models.text_encoder.words import WordText

V, GRID, T, B = 7, (2, 4), 4, 2
TOKENS = GRID[0] * GRID[1]
EXACT = {"rtol": 0, "atol": 1e-10}
STACKS = {
    "hydra": {},
    "blocks": {"scan_blocks": ((2, 2), None)},
    "hybrid": {"attention_layers": (1,), "attention_frames": 3},
    "attention": {"mixer": "attention", "attention_frames": 2},
    "wide_conv": {"conv_size": (2, 3, 3)},
}


def model(**changes) -> HydraVideoGenerator:
    """Float64 model in which no weight is 0, so that gates and nulls have an effect."""
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, "mlp_ratio": 2.0, "memory_frames": 4}
    network = HydraVideoGenerator(V, GRID, **{**options, **changes})
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.double().eval()


def conditioned(**changes) -> HydraVideoGenerator:
    text = WordText(6, 8, ["red", "left"], pooled_dim=5)
    return model(num_classes={"motion": 3, "color": 2, "unused": None}, text=text, num_actions=4, **changes)


def conditions(frames: int = T - 1) -> Conditioning:
    labels = {"motion": torch.tensor([0, 2]), "color": torch.tensor([1, 0])}
    return Conditioning(labels, ["red", "left red"], torch.randint(4, (B, frames)))


def clean(frames: int = T, batch: int = B) -> Tensor:
    return torch.randint(V, (batch, frames, *GRID))


def corrupted(ids: Tensor) -> Tensor:
    return ids.masked_fill(torch.rand(ids.shape) < 0.5, V)


@pytest.fixture(params=STACKS, name="stack")
def fixture_stack(request) -> dict:
    return STACKS[request.param]


def test_teacher_forcing_equals_evaluation_of_each_frame_after_its_clean_past(stack):
    network, ids, given = conditioned(**stack), clean(), conditions()
    masked = corrupted(ids)
    logits = network.teacher_forced(ids, masked, given)
    assert logits.shape == (B, T, *GRID, V)
    for frame in range(T):
        video = torch.cat([ids[:, :frame], masked[:, frame : frame + 1]], dim=1)
        expected = network(video, given._replace(actions=given.actions[:, :frame]))[:, -1]
        torch.testing.assert_close(logits[:, frame], expected, **EXACT)


def test_teacher_forcing_continues_from_states(stack):
    network, ids = model(**stack), clean(6)
    masked = corrupted(ids)
    states = network.commit(ids[:, :2], network.condition(None, B, 2))
    torch.testing.assert_close(
        network.teacher_forced(ids[:, 2:], masked[:, 2:], states=states),
        network.teacher_forced(ids, masked)[:, 2:],
        **EXACT,
    )


def test_logits_depend_on_the_own_and_earlier_frames_only(stack):
    network, ids, other = model(**stack), clean(), clean()
    for frame in range(T):
        changed = torch.cat([ids[:, :frame], other[:, frame:]], dim=1)
        a, b = network(ids), network(changed)
        torch.testing.assert_close(a[:, :frame], b[:, :frame], **EXACT)
        assert (a[:, frame] != b[:, frame]).any(-1).all()  # every token of the frame, also those before the change


def test_memory_reaches_past_the_window_of_attention():
    ids = clean(5)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % V
    for stack, remembers in (("hydra", True), ("hybrid", True), ("attention", False)):
        network = model(**STACKS[stack])
        assert torch.equal(network(ids)[:, -1], network(changed)[:, -1]) is not remembers


def test_streaming_equals_the_whole_video_at_constant_size(stack):
    network, ids, given, frames = conditioned(**stack), clean(8, 1), torch.randint(4, (1, 7)), 8
    expected = network(ids, Conditioning(actions=given))
    states, sizes, outputs = None, set(), []
    for frame in range(frames):
        action = given[:, max(frame - 1, 0) : frame]
        vectors = network.condition(Conditioning(actions=action), 1, 1, first=frame == 0)
        outputs.append(network.evaluate(ids[:, frame : frame + 1], vectors, states)[0])
        states = network.commit(ids[:, frame : frame + 1], vectors, states)
        sizes.add(sum(part.untyped_storage().nbytes() for state in states for part in state))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **EXACT)
    assert len(sizes) == 1


def test_initial_states_equal_no_states(stack):
    network, ids = model(**stack), clean()
    torch.testing.assert_close(network(ids, states=network.initial_states(B)), network(ids), **EXACT)


@pytest.mark.parametrize("granularity", ["token", "row", "frame", (1, 2)], ids=str)
def test_cached_evaluation_equals_parallel_evaluation_if_tokens_do_not_change(stack, granularity):
    network, past, frame = model(**stack), clean(3), corrupted(clean(1))
    vectors, chunks = network.condition(None, B, 1), Chunks.of(granularity, GRID)
    states = network.commit(past, vectors)
    logits, cache = network.cache_frame(frame.flatten(1), vectors, chunks, states)
    torch.testing.assert_close(logits, network.evaluate(frame, vectors, states)[0].flatten(1, 3), **EXACT)
    for index, positions in enumerate(chunks.positions()):
        update = network.update_chunk(frame.flatten(1)[:, positions], index, cache)
        torch.testing.assert_close(update, logits[:, positions], **EXACT)


@pytest.mark.parametrize("stack", [{"depth": 1}, {"depth": 1, **STACKS["attention"]}], ids=["hydra", "attention"])
def test_cached_evaluation_of_one_layer_is_exact_for_changed_tokens(stack):
    network, old, new = model(**stack), clean(1).flatten(1), clean(1).flatten(1)
    vectors, chunks = network.condition(None, B, 1), Chunks.of("row", GRID)
    states = network.commit(clean(2), vectors)
    _, cache = network.cache_frame(old, vectors, chunks, states)
    current = old.clone()
    for index, positions in enumerate(chunks.positions()):
        current[:, positions] = new[:, positions]
        update = network.update_chunk(new[:, positions], index, cache)
        expected = network.evaluate(current.view(B, 1, *GRID), vectors, states)[0].flatten(1, 3)
        torch.testing.assert_close(update, expected[:, positions], **EXACT)


def test_gradients_reach_every_parameter(stack):
    network, ids = conditioned(**stack), clean()
    given = conditions()._replace(drop=torch.tensor([False, True]))
    network.teacher_forced(ids, corrupted(ids), given).square().mean().backward()
    without = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_new_models_are_independent_of_context_and_conditioning():
    network = HydraVideoGenerator(V, GRID, embed_dim=16, depth=2, head_dim=8, state_dim=4, num_classes={"motion": 3})
    a, b = (network(clean(2)[:1], Conditioning({"motion": torch.tensor([label])})) for label in (0, 1))
    assert a.shape == b.shape
    logits = network(torch.full((1, 2, *GRID), V), Conditioning({"motion": torch.tensor([0])}))
    torch.testing.assert_close(logits[:, 0], logits[:, 1])  # gates are 0


# ---- conditioning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["motion", "color", "text", "actions"])
def test_every_condition_changes_the_logits(part):
    network, ids, given = conditioned(), clean(), conditions()
    changed = {
        "motion": given._replace(labels={**given.labels, "motion": torch.tensor([1, 1])}),
        "color": given._replace(labels={**given.labels, "color": torch.tensor([0, 1])}),
        "text": given._replace(text=["left", "red"]),
        "actions": given._replace(actions=(given.actions + 1) % 4),
    }[part]
    a, b = network(ids, given), network(ids, changed)
    first = 1 if part == "actions" else 0  # no action leads to the first frame
    torch.testing.assert_close(a[:, :first], b[:, :first], **EXACT)
    assert (a[:, first:] != b[:, first:]).any(-1).all()


def test_the_action_that_leads_to_a_frame_conditions_it():
    network, ids, given = conditioned(), clean(), conditions()
    actions = given.actions.clone()
    actions[:, 1] = (actions[:, 1] + 1) % 4
    a, b = network(ids, given), network(ids, given._replace(actions=actions))
    torch.testing.assert_close(a[:, :2], b[:, :2], **EXACT)
    assert (a[:, 2] != b[:, 2]).any()


def test_several_actions_per_frame_are_not_interchangeable():
    network, ids, actions = model(num_actions=4, actions_per_frame=2), clean(2), torch.tensor([[[0, 1]], [[2, 3]]])
    a, b = (network(ids, Conditioning(actions=given))[:, 1] for given in (actions, actions.flip(2)))
    assert (a != b).any()


def test_dropped_clips_equal_clips_without_conditioning():
    network, ids, given = conditioned(), clean(), conditions()
    dropped = network(ids, given._replace(drop=torch.tensor([True, False])))
    torch.testing.assert_close(dropped[0], network(ids)[0], **EXACT)
    torch.testing.assert_close(dropped[1], network(ids, given)[1], **EXACT)


def test_frozen_text_encoders_are_not_trained_and_equal_their_embeddings():
    text = WordText(6, 8, ["red", "left"], pooled_dim=5)
    text.frozen = True
    network = model(text=text)
    assert not any(parameter.requires_grad for parameter in network.text.parameters())
    captions, ids = ["red", "left"], clean()
    pooled = network.text(captions).pooled
    torch.testing.assert_close(
        network(ids, Conditioning(text=captions)), network(ids, Conditioning(text=pooled)), **EXACT
    )


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed_dim", [16, 48])
def test_attention_layers_have_the_parameters_of_hydra_layers(embed_dim):
    counts = []
    for mixer in ("hydra_video", "attention"):
        network = HydraVideoGenerator(V, GRID, embed_dim=embed_dim, depth=1, head_dim=8, state_dim=4, mixer=mixer)
        counts.append(sum(parameter.numel() for parameter in network.blocks.parameters()))
    assert abs(counts[0] - counts[1]) <= embed_dim + 1


def test_memory_frames_set_the_smallest_initial_step():
    torch.manual_seed(0)
    network = HydraVideoGenerator(V, GRID, embed_dim=64, depth=2, head_dim=2, scan_blocks=((1, 1), None))
    for block, tokens in zip(network.blocks, (1, TOKENS)):
        step = torch.nn.functional.softplus(block.mixer.dt_bias[0]).min().item()
        assert 1 / (100 * tokens) <= step * 1.0001 < 2.5 / (100 * tokens)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 1}, r"vocabulary=1\b"),
        ({"depth": 0}, r"depth=0\b"),
        ({"mixer": "mamba"}, r"mixer='mamba'.*'attention'"),
        ({"scan_blocks": ((2, 3),)}, r"scan_blocks has \(2, 3\).*use \(2, 2\)"),
        ({"attention_layers": (2,)}, r"attention_layers has 2\b.*0 to 1"),
        ({"attention_layers": (0,), "attention_frames": 0}, r"attention_frames=0\b"),
        ({"attention_layers": (0,), "head_dim": 32}, r"head_dim=32\b.*embed_dim=16"),
        ({"num_classes": {"motion": 0}}, r"num_classes.motion=0\b"),
        ({"text": WordText(6, 8, ["a"])}, r"text.pooled_dim=0\b"),
        ({"text": WordText(6, 8, ["a"], pooled_dim=5), "text_dim": 6}, r"pooled_dim=5\b.*text_dim=6\b"),
        ({"mlp_ratio": 0}, r"mlp_ratio=0\b"),
    ],
    ids=str,
)
def test_bad_settings_raise(changes, message):
    options = {"vocabulary": V, "grid": GRID, "embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, **changes}
    with pytest.raises(ValueError, match=message):
        HydraVideoGenerator(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(clean().index_fill(1, torch.tensor([1]), V + 1)), r"ids has 8\b.*0 to 7\b"),
        (lambda m: m(-clean() - 1), r"ids has -\d.*0 to 7\b"),
        (lambda m: m(clean().float()), r"ids is a torch.float32"),
        (lambda m: m(clean().transpose(2, 3)), r"\(2, 4, 4, 2\).*grid=\(2, 4\)"),
        (lambda m: m.teacher_forced(corrupted(clean()), clean()), r"ids has 7\b.*0 to 6\b"),
        (lambda m: m.teacher_forced(clean(), clean(3)), r"corrupted has shape \(2, 3, 2, 4\)"),
        (lambda m: m.commit(corrupted(clean()), m.condition(None, B, T)), r"ids has 7\b.*0 to 6\b"),
        (lambda m: m(clean(), conditions(T)), r"\(2, 4\).*\(2, 3, 1\).*4 frames but the first"),
        (lambda m: m(clean(), conditions(T - 1), m.initial_states(B)), r"\(2, 3\).*\(2, 4, 1\).*4 frames"),
        (lambda m: m(clean(), Conditioning(actions=torch.full((B, 3), 4))), r"actions has 4\b.*0 to 3\b"),
        (lambda m: m(clean(), Conditioning({"motion": torch.tensor([0, 3])})), r"labels.motion has 3\b.*0 to 2\b"),
        (lambda m: m(clean(), Conditioning({"motion": torch.tensor([0])})), r"motion has 1 entries for 2"),
        (lambda m: m(clean(), Conditioning({"shape": torch.tensor([0, 1])})), r"labels has 'shape'.*motion, color"),
        (lambda m: m(clean(), states=m.initial_states(B)[:1]), r"states has 1 layers.* 2\b"),
        (lambda m: m(clean(), states=m.initial_states(1)), r"the state has shapes"),
    ],
)
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call(conditioned())


def test_conditions_of_a_model_without_them_raise():
    for given, message in ((Conditioning(text=["a", "b"]), r"text=null"), (conditions(), r"labels has 'color'.*none")):
        with pytest.raises(ValueError, match=message):
            model()(clean(), given)
    with pytest.raises(ValueError, match=r"num_actions=0"):
        model()(clean(), Conditioning(actions=torch.zeros(B, T - 1, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"text=null.*\(B, P\)"):
        model(text_dim=5)(clean(), Conditioning(text=["a", "b"]))


def test_attention_states_of_a_different_batch_raise():
    network = model(**STACKS["attention"])
    with pytest.raises(ValueError, match=r"keys of shape \(1, 1, 8, 2, 8\), expected \(2, 1, 8, 2, 8\)"):
        network(clean(), states=network.initial_states(1))
