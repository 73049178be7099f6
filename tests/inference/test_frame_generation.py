"""Generation frame by frame: counters, modes, seeds, guidance, prompts, actions, constant memory, errors."""

import doctest
import itertools

import pytest
import torch
from torch import Tensor

from blueberry_video.inference import frame_generation
from blueberry_video.inference.frame_generation import FrameDecoding, collect_frames, generate_clips, generate_frames
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator

V, GRID = 5, (2, 4)
S = GRID[0] * GRID[1]
MODES = [
    {"mode": "cached"},
    {"mode": "cached", "advance": "sample"},
    {"mode": "cached", "advance": "sample", "mask_updates": True},
    {"mode": "parallel"},
    {"mode": "autoregressive"},
]
STACKS = {"hydra": {}, "hybrid": {"attention_layers": (1,)}, "attention": {"mixer": "attention"}}


def model(**changes) -> HydraVideoGenerator:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, "mlp_ratio": 1.0, "memory_frames": 4}
    options |= {"num_classes": {"motion": 3}, "num_actions": 4, "attention_frames": 2, "scan_blocks": ((2, 2), None)}
    network = HydraVideoGenerator(V, GRID, **{**options, **changes})
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.double().eval()


def motion(*labels: int) -> Conditioning:
    return Conditioning({"motion": torch.tensor(labels)})


class Counter:
    """Counts the tokens that a model evaluates, by hooks on its head."""

    def __init__(self, network: HydraVideoGenerator):
        self.tokens = 0
        network.tokens.register_forward_hook(self.count)

    def count(self, module, inputs, output: Tensor) -> None:
        self.tokens += inputs[0].numel()


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize(("granularity", "guidance"), [("row", 1), ("token", 1), ("frame", 2.0), ((1, 2), 1)], ids=str)
def test_counters_equal_the_evaluated_tokens_and_the_documented_number(settings, granularity, guidance):
    network, rounds = model(), 3
    decoding = FrameDecoding(rounds, granularity, guidance=guidance, **settings)
    counter = Counter(network)
    stream = generate_frames(network, motion(0, 1), 2, decoding, generator=[0, 1])
    ids = collect_frames(stream)
    assert ids.shape == (2, 2, *GRID)
    assert ids.min() >= 0 and ids.max() < V  # noqa: PT018
    expected = {
        "cached": 3 * rounds * S + S if settings.get("advance") == "sample" else 2 * rounds * S + S,
        "parallel": rounds * S + S,
        "autoregressive": rounds * S + 3 * S,
    }[settings["mode"]] * (2 if guidance != 1 else 1)
    assert decoding.evaluations(S) == expected
    assert stream.evaluations == 2 * expected
    assert counter.tokens == 2 * 2 * expected  # two clips


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_clips_do_not_depend_on_their_batch(settings):
    network, decoding = model(), FrameDecoding(2, guidance=1.5, choice_temperature=1.0, **settings)
    together = collect_frames(generate_frames(network, motion(0, 1, 2), 3, decoding, generator=[3, 4, 5]))
    alone = [
        collect_frames(generate_frames(network, motion(label), 3, decoding, generator=[label + 3]))
        for label in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(clip.flatten().tolist()) for clip in together}) == 3


def test_one_generator_seeds_every_clip_and_the_global_one_is_used_without():
    network = model()
    a, b = (
        collect_frames(generate_frames(network, None, 2, generator=torch.Generator().manual_seed(1), num_clips=count))
        for count in (3, 2)
    )
    assert torch.equal(a[:2], b)
    torch.manual_seed(2)
    first = collect_frames(generate_frames(network, None, 2))
    torch.manual_seed(2)
    assert torch.equal(first, collect_frames(generate_frames(network, None, 2)))


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_guidance_of_scale_1_equals_no_guidance(settings, monkeypatch):
    network = model()
    plain = collect_frames(generate_frames(network, motion(2), 2, FrameDecoding(2, **settings), generator=[0]))
    stream = generate_frames(network, motion(2), 2, FrameDecoding(2, guidance=1 + 1e-13, **settings), generator=[0])
    assert torch.equal(collect_frames(stream), plain)
    assert stream.evaluations == 2 * 2 * FrameDecoding(2, **settings).evaluations(S)
    strong = FrameDecoding(2, guidance=6.0, **settings)
    assert not torch.equal(collect_frames(generate_frames(network, motion(2), 2, strong, generator=[0])), plain)


def test_guidance_of_scale_0_equals_no_conditioning():
    network = model()
    decoding, plain = FrameDecoding(2, guidance=0.0), FrameDecoding(2)
    a = collect_frames(generate_frames(network, motion(2), 2, decoding, generator=[0]))
    assert torch.equal(a, collect_frames(generate_frames(network, None, 2, plain, generator=[0])))


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_temperature_0_is_deterministic(settings):
    network, decoding = model(), FrameDecoding(2, temperature=0, **settings)
    a, b = (collect_frames(generate_frames(network, motion(1), 3, decoding, generator=[seed])) for seed in (0, 1))
    assert torch.equal(a, b)


def test_one_parallel_round_samples_the_distribution_of_the_model():
    network = model()
    count, decoding = 4000, FrameDecoding(1, mode="parallel")
    drawn = collect_frames(generate_frames(network, None, 1, decoding, generator=list(range(count))))[:, 0].flatten(1)
    expected = network(torch.full((1, 1, *GRID), V)).flatten(1, 3).softmax(-1)[0]  # (S, V)
    share = torch.nn.functional.one_hot(drawn, V).double().mean(0)
    assert (share - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_autoregressive_tokens_sample_from_their_left_context():
    """A model that copies the token to the left, from its embedding, is followed exactly by greedy decoding."""
    network = model(depth=1)
    decoding = FrameDecoding(1, "token", temperature=0, mode="autoregressive")
    ids = next(generate_frames(network, None, 1, decoding)).flatten(1)
    vectors, masked = network.condition(None, 1, 1), torch.full((1, S), V)
    for position in range(S):
        logits = network.evaluate(masked.view(1, 1, *GRID), vectors)[0].flatten(1, 3)
        masked[0, position] = logits[0, position].argmax()  # a layer alone is exact
    assert torch.equal(ids, masked)


@pytest.mark.parametrize("advance", ["estimate", "sample"])
def test_a_cached_round_equals_its_definition_by_full_evaluation(advance):
    """With one layer and chunks of a row, every update equals the full evaluation of a frame with the same tokens."""
    network, settings = model(depth=1, scan_blocks=(None,)), {"rounds": 1, "temperature": 0.0, "advance": advance}
    ids = next(generate_frames(network, None, 1, FrameDecoding(**settings))).flatten(1)
    vectors = network.condition(None, 1, 1)

    def greedy(left: Tensor, right: Tensor, row: int) -> Tensor:
        """Rows up to ``row`` from ``left``, the later ones from ``right``."""
        frame = torch.cat([left.view(GRID)[: row + 1], right.view(GRID)[row + 1 :]])
        return network.evaluate(frame.view(1, 1, *GRID), vectors)[0].argmax(-1)[0, 0, row]

    masked = torch.full((S,), V)
    estimate = network.evaluate(masked.view(1, 1, *GRID), vectors)[0].argmax(-1).flatten()
    left, rows = estimate.clone().view(GRID), []
    for row in range(GRID[0]):
        rows.append(greedy(left, masked, row))
        if advance == "sample":
            left[row] = rows[-1]
    assert torch.equal(ids, torch.cat(rows)[None])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("settings", [MODES[0], MODES[4]], ids=str)
def test_a_prompt_continues_as_the_same_video(stack, settings):
    network, decoding = model(**STACKS[stack]), FrameDecoding(1, temperature=0, **settings)
    actions = torch.randint(4, (2, 5))
    whole = collect_frames(generate_frames(network, motion(0, 1), 6, decoding, actions=actions))
    rest = generate_frames(
        network, motion(0, 1), 3, decoding, whole[:, :3], actions=actions[:, 2:], prompt_actions=actions[:, :2]
    )
    assert torch.equal(collect_frames(rest), whole[:, 3:])
    assert rest.evaluations == 3 * decoding.evaluations(S)


def test_actions_set_the_length_and_change_the_frames_that_they_lead_to():
    network, decoding = model(), FrameDecoding(1, temperature=0)
    actions = torch.tensor([[0, 1, 2]])
    a = collect_frames(generate_frames(network, decoding=decoding, actions=actions))
    assert a.shape == (1, 4, *GRID)
    b = collect_frames(generate_frames(network, decoding=decoding, actions=torch.tensor([[0, 3, 2]])))
    assert torch.equal(a[:, :2], b[:, :2])
    assert not torch.equal(a[:, 2], b[:, 2])
    stream = generate_frames(network, decoding=decoding, num_clips=1)
    steps = [stream.step(), *(stream.step(action) for action in actions.unbind(1))]
    assert torch.equal(torch.stack(steps, dim=1), a)


def test_several_actions_per_frame():
    network = model(num_actions=3, actions_per_frame=2)
    ids = collect_frames(
        generate_frames(network, actions=torch.randint(3, (2, 2, 2)), prompt_ids=torch.zeros(2, 1, *GRID).long())
    )
    assert ids.shape == (2, 2, *GRID)


@pytest.mark.parametrize(("stack", "count"), [("hydra", 512), ("hybrid", 32), ("attention", 32)])
def test_states_have_constant_size_for_any_number_of_frames(stack, count):
    network, sizes = model(depth=2, **STACKS[stack]), set()
    stream = generate_frames(network, decoding=FrameDecoding(1, mode="parallel"), generator=[0])
    for _ in itertools.islice(stream, count):
        sizes.add(sum(part.untyped_storage().nbytes() for state in stream.states for part in state))
    assert stream.generated == count
    assert len(sizes) == 1


def test_the_schedule_masks_the_least_confident_tokens():
    assert [round(FrameDecoding(4).masked_share(step), 3) for step in range(5)] == [1.0, 0.924, 0.707, 0.383, 0.0]
    assert [FrameDecoding(4, schedule="linear").masked_share(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    stream = generate_frames(model(), decoding=FrameDecoding(2, schedule="linear"))
    ids, masked = stream._masked(torch.arange(4)[None], torch.tensor([[0.3, 0.1, torch.inf, 0.2]]), 1)
    assert masked.tolist() == [[False, True, False, True]]
    assert ids.tolist() == [[0, V, 2, V]]


def test_example_of_the_docstring():
    assert doctest.testmod(frame_generation).failed == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, r"rounds=0\b"),
        ({"mode": "serial"}, r"mode='serial'.*'autoregressive'"),
        ({"schedule": "sine"}, r"schedule='sine'.*'cosine'"),
        ({"advance": "never"}, r"advance='never'.*'estimate'"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"guidance": float("nan")}, r"guidance=nan"),
        ({"mask_updates": True}, r"mask_updates=True.*'estimate'.*'sample'"),
    ],
    ids=str,
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameDecoding(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, r"num_frames=0\b"),
        (
            {"num_frames": 4, "actions": torch.zeros(1, 4).long()},
            r"4 per clip.*num_frames=4 requires 3\b.*num_frames=5",
        ),
        (
            {"num_frames": 4, "actions": torch.zeros(1, 3).long(), "prompt_ids": torch.zeros(1, 1, *GRID).long()},
            r"3 per clip.*num_frames=4 requires 4\b.*num_frames=3\b",
        ),
        ({"prompt_actions": torch.zeros(1, 3).long()}, r"prompt_actions requires prompt_ids"),
        ({"prompt_ids": torch.full((1, 2, *GRID), V)}, r"ids has 5\b.*0 to 4\b"),
        ({"prompt_ids": torch.zeros(1, 2, 4, 2).long()}, r"\(1, 2, 4, 2\).*grid=\(2, 4\)"),
        ({"conditioning": motion(0, 1), "generator": [0]}, r"labels.motion: 2, generator: 1"),
        ({"conditioning": Conditioning(actions=torch.zeros(1, 3).long())}, r"conditioning.actions.*actions="),
        ({"decoding": FrameDecoding(granularity=3)}, r"rows=3 must divide 2, use 2\b"),
        ({"decoding": FrameDecoding(granularity=(2, 2))}, r"2 x 2.*scan_blocks=2 x 4"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_frames(model(), **arguments)


def test_actions_out_of_range_and_of_a_model_without_raise():
    with pytest.raises(ValueError, match=r"actions has 4\b.*0 to 3\b"):
        generate_frames(model(), actions=torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match=r"num_actions=0"):
        generate_frames(model(num_actions=0), actions=torch.tensor([[0]]))


def test_a_stream_without_limit_is_not_collected():
    with pytest.raises(ValueError, match=r"num_frames=None"):
        collect_frames(generate_frames(model()))


def test_clips_have_the_actions_of_all_frames_and_begin_with_the_prompt():
    network, actions = model(), torch.randint(4, (2, 5))
    given = motion(0, 1)._replace(actions=actions)
    decoding = FrameDecoding(1, temperature=0)
    whole = generate_clips(network, given, 6, decoding)
    assert torch.equal(generate_clips(network, given, 6, decoding, whole[:, :2]), whole)
    assert generate_clips(network, Conditioning(), 2, decoding, num_clips=3).shape == (3, 2, *GRID)
    with pytest.raises(ValueError, match=r"prompt has 6 frames: num_frames=6 must be at least 7"):
        generate_clips(network, given, 6, decoding, whole)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("settings", [MODES[1], MODES[3]], ids=str)
def test_generation_in_bfloat16(stack, settings):
    network = model(**STACKS[stack]).float()
    with torch.autocast("cpu", torch.bfloat16):
        ids = collect_frames(generate_frames(network, motion(0, 1), 3, FrameDecoding(2, **settings), generator=[0, 1]))
    assert ids.shape == (2, 3, *GRID)
    low = collect_frames(generate_frames(network.bfloat16(), motion(0, 1), 3, FrameDecoding(2, **settings)))
    assert low.max() < V
