"""Settings of evaluations reach what they evaluate: seeds, generators, ranks, bins and boundaries."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.evaluation import closed_loop, shape_metrics
from blueberry_video.evaluation.closed_loop import ClosedLoop
from blueberry_video.evaluation.collapse import CollapseMonitor
from blueberry_video.evaluation.denoising import denoising_losses
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.evaluation.noise_fraction import timesteps_at_noise_fraction
from blueberry_video.models.text_encoder.base import TextTokens

# ---- closed loop -----------------------------------------------------------------------------------------------------


class Line:
    """Environment of a point on a line: action 0 moves by -1, action 1 by 0, action 2 by +2; images show 10 x + 100."""

    def __init__(self):
        self.state, self.stepped = None, []

    def reset(self, seed):
        self.state = SimpleNamespace(vector=np.array([float(seed[1])]))
        return self.state

    def step(self, action):
        self.stepped.append((self.state.vector[0], action))
        self.state = SimpleNamespace(vector=self.state.vector + (-1.0, 0.0, 2.0)[action])
        return self.state

    def render(self, state):
        return torch.full((3, 2, 2), int(10 * state.vector[0] + 100), dtype=torch.uint8)


class Planned:
    """Planner that records what it receives and returns two steps: first +2, then -1."""

    actions = SimpleNamespace(width=3)

    def __init__(self):
        self.calls: list[SimpleNamespace] = []

    def plan(self, model, images, states, goals, generator=None):
        self.calls.append(SimpleNamespace(images=images, states=states, goals=goals, seed=generator.initial_seed()))
        torch.rand(1, generator=generator)
        return torch.eye(3)[torch.tensor([[2, 0]] * len(images))]


def loop(**changes) -> ClosedLoop:
    settings = {"episodes": 4, "goal_steps": 3, "min_distance": 1.0, "tolerance": 0.5, "random_tries": 2, "seed": 11}
    return ClosedLoop(Line(), Planned(), **{**settings, **changes})


def task() -> SimpleNamespace:
    device = torch.device("cpu")
    return SimpleNamespace(model=torch.nn.Identity(), device=device, normalize=lambda video: (video * 255 - 100) / 10)


def test_the_planner_receives_images_states_goals_and_the_seeded_generator():
    callback = loop(max_steps=3, tolerance=0.0)
    episodes = [callback._episode(number) for number in range(4)]
    values = callback.measure(task())
    first = callback.planner.calls[0]
    assert first.images.shape == first.goals.shape == (4, 3, 2, 2)
    torch.testing.assert_close(first.images[:, 0, 0, 0], torch.arange(4.0))
    torch.testing.assert_close(first.states, torch.arange(4.0)[:, None])
    torch.testing.assert_close(first.goals[:, 1, 1, 1], torch.tensor([goal.vector[0] for _, goal in episodes]).float())
    assert {call.seed for call in callback.planner.calls} == {11}
    distances = [min(abs(start.vector + 2 * k - goal.vector)[0] for k in (3,)) for start, goal in episodes]
    reached = [any(start.vector + 2 * k == goal.vector for k in (1, 2, 3)) for start, goal in episodes]
    assert values["success"] == np.mean(reached)
    assert values["distance"] == np.mean([0 if done else d for done, d in zip(reached, distances, strict=True)])


def test_only_unfinished_episodes_are_planned_with_separate_goals():
    callback = loop(episodes=3, max_steps=2, tolerance=0.0)
    goals = {0: 2.0, 1: 5.0, 2: 4.0}  # reached at steps 1, 2 and 1
    callback._episode = lambda i: (callback.environment.reset((2, i)), SimpleNamespace(vector=np.array([goals[i]])))
    values = callback.measure(task())
    second = callback.planner.calls[1]
    assert second.states.tolist() == [[3.0]]
    torch.testing.assert_close(second.goals[:, 0, 0, 0], torch.tensor([5.0]))
    assert values["success"] == 1
    assert values["steps"] == pytest.approx(4 / 3)
    assert values["distance"] == 0
    assert len(callback.planner.calls) == 2


@pytest.mark.parametrize(("tolerance", "success"), [(0.99, 0), (1.0, 1)])
def test_a_distance_equal_to_the_tolerance_reaches_the_goal(tolerance: float, success: int):
    callback = loop(episodes=2, max_steps=1, tolerance=tolerance, min_distance=2.0)
    callback._episode = lambda i: (callback.environment.reset((2, i)), SimpleNamespace(vector=np.array([i + 3.0])))
    assert callback.measure(task())["success"] == success


def test_a_goal_at_exactly_the_min_distance_is_accepted_and_a_nearer_one_is_drawn_again(monkeypatch):
    callback = loop(goal_steps=1, min_distance=2.0)
    for number in range(8):
        start, goal = callback._episode(number)
        assert goal.vector - start.vector == [2.0]
    far = loop(goal_steps=1, min_distance=2.5, tolerance=0.1)
    monkeypatch.setattr(closed_loop, "GOAL_DRAWS", 7)
    with pytest.raises(ValueError, match=r"goal_steps=1\b.*min_distance=2\.5\b.*episode 3\b.*\b7\b"):
        far._episode(3)
    assert len(far.environment.stepped) == 7
    assert {start for start, _ in far.environment.stepped} == {3.0}, "every draw begins at the start"


def test_goals_and_random_actions_depend_on_the_seed_and_the_episode():
    same, again, other = (
        [loop(seed=seed, goal_steps=9)._episode(i)[1].vector[0] - i for i in range(12)] for seed in (0, 0, 1)
    )
    assert same == again != other
    assert len(set(same)) > 2


def test_the_random_policy_plays_all_tries_on_the_same_episodes():
    callback = loop(random_tries=5, max_steps=2, episodes=3)
    played, play = [], callback._play
    callback._play = lambda starts, goals, policy: played.append((starts, goals)) or play(starts, goals, policy)
    first = callback.measure(task())
    assert len(played) == 6
    assert all(starts is played[0][0] and goals is played[0][1] for starts, goals in played)
    assert {action for _, action in callback.environment.stepped} == {0, 1, 2}
    assert loop(random_tries=5, max_steps=2, episodes=3).measure(task()) == first


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("callback", "prefix"), [(loop(name="act"), "act"), (GeneratedShapes(36), "sampling")], ids=["loop", "shapes"]
)
def test_only_rank_zero_evaluates_at_the_end(callback, prefix: str, rank: int, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(callback, "measure", lambda task: calls.append(task) or {"success": 0.25})
    trainer = SimpleNamespace(is_global_zero=rank == 0, global_step=3, default_root_dir=tmp_path, loggers=[])
    trainer.callback_metrics, trainer.lightning_module = {}, torch.nn.Module()
    callback.on_train_end(trainer, "task")
    assert calls == ([] if rank else ["task"])
    assert list(trainer.callback_metrics) == ([] if rank else [f"{prefix}/success"])


def test_random_actions_depend_on_the_seed():
    found = []
    for seed in (0, 0, 1):
        callback = loop(seed=seed, random_tries=4, max_steps=6, episodes=2, tolerance=0.0)
        callback._episode = lambda i, callback=callback: (
            callback.environment.reset((2, i)),
            SimpleNamespace(vector=np.array([i + 0.5])),
        )
        callback.measure(task())
        found.append([action for _, action in callback.environment.stepped][12:])
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 4 * 6 * 2


# ---- generated shapes ------------------------------------------------------------------------------------------------


def test_batches_and_the_seed_of_generated_shapes():
    sizes, drawn = [], []

    def generate(captions, generator):
        sizes.append(len(captions))
        drawn.append((generator.initial_seed(), torch.rand(1, generator=generator).item()))
        return torch.zeros(len(captions), 3, 8, 16, 16)

    task = SimpleNamespace(generate=generate)
    GeneratedShapes(72, 25, seed=9).measure(task)
    assert sizes == [25, 25, 22]
    assert {seed for seed, _ in drawn} == {9}
    assert len({number for _, number in drawn}) == 3, "one generator for all batches"
    GeneratedShapes(36, 1).measure(task)
    assert sizes[3:] == [1] * 36
    with pytest.raises(ValueError, match=r"batch_size=0\b"):
        GeneratedShapes(36, 0)


def test_shuffled_frames_have_a_separate_order_for_every_clip(monkeypatch: pytest.MonkeyPatch):
    seen = []
    module = "blueberry_video.evaluation.generated_shapes.accuracies"
    names = ("colour", "shape", "direction")
    monkeypatch.setattr(module, lambda video, labels: seen.append(video) or dict.fromkeys(names, len(seen)))
    clip = torch.arange(8.0).view(1, 1, 8, 1, 1)
    task = SimpleNamespace(generate=lambda captions, _: clip.expand(len(captions), 3, 8, 2, 2))
    found = GeneratedShapes(36).measure(task)
    assert (found["direction"], found["direction_shuffled"]) == (1, 2)
    plain, shuffled, same = (video[:, 0, :, 0, 0] for video in seen)  # the last with the captions of other clips
    assert (same == plain).all()
    assert (plain == torch.arange(8)).all()
    assert (shuffled.sort(dim=1).values == plain).all()
    assert len(shuffled.unique(dim=0)) > 30


# ---- denoising -------------------------------------------------------------------------------------------------------


def measured(objective, clips: int = 3) -> dict[str, torch.Tensor]:
    text = TextTokens(torch.zeros(clips, 1, 1), torch.ones(clips, 1, dtype=torch.bool))
    clean = torch.randn(clips, 1, 2, 2, 2)
    return denoising_losses(
        lambda noisy, t, text: torch.zeros_like(noisy), objective, clean, text, text, torch.Generator().manual_seed(0)
    )


def test_names_of_the_denoising_losses():
    bins = [f"t{low:02d}_{low + 10:02d}" for low in range(0, 100, 10)]
    kinds = ["", *(f"_{name}" for name in bins), "_t95", "_shuffled", "_t95_shuffled", "_trivial", "_t95_trivial"]
    assert measured(FlowMatching()).keys() == {f"loss{kind}" for kind in kinds}
    units = ("loss", "flow_loss")
    assert measured(VPrediction()).keys() == {f"{unit}{kind}" for unit in units for kind in kinds}


def test_the_network_is_evaluated_once_per_text_and_round_with_the_same_noise():
    """Ten rounds and the range near pure noise."""
    seen = []

    def denoise(noisy, t, text):
        seen.append((text.tokens[0, 0, 0].item(), noisy, t))
        return torch.zeros_like(noisy)

    own, other = (TextTokens(torch.full((8, 1, 1), value), torch.ones(8, 1, dtype=torch.bool)) for value in (1.0, 2.0))
    clean = torch.randn(8, 1, 2, 2, 2)
    denoising_losses(denoise, VPrediction(), clean, own, other, torch.Generator().manual_seed(0))
    assert [text for text, _, _ in seen] == [1, 2] * 11
    for (_, noisy, t), (_, same, again) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(noisy, same)
        assert torch.equal(t, again)
    seen.clear()
    denoising_losses(denoise, FlowMatching(), clean, own, None, torch.Generator().manual_seed(0))
    assert [text for text, _, _ in seen] == [1] * 11


def noise_fractions(seeds: list[int]) -> torch.Tensor:
    """Noise fractions (11, B) at which clips of these seeds are denoised."""
    times = []
    text = TextTokens(torch.zeros(len(seeds), 1, 1), torch.ones(len(seeds), 1, dtype=torch.bool))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    denoising_losses(
        lambda noisy, t, text: times.append(t) or torch.zeros_like(noisy),
        FlowMatching(), torch.zeros(len(seeds), 1, 1, 2, 2), text, None, generators,
    )  # fmt: skip
    return torch.stack(times)


def test_every_clip_has_one_noise_fraction_in_each_tenth():
    fractions = noise_fractions(list(range(50)))
    offset = fractions[0] * 10
    assert ((offset >= 0) & (offset < 1)).all()
    for number, row in enumerate(fractions[:-1]):
        torch.testing.assert_close(row, (number + (1 - offset if number % 2 else offset)) / 10)
    torch.testing.assert_close(fractions[-1], 0.95 + 0.05 * offset)
    torch.testing.assert_close(fractions[:-1].mean(dim=0), torch.full((50,), 0.5))
    assert offset.std() > 0.2  # clips differ


def test_the_noise_fractions_of_a_clip_do_not_depend_on_its_batch():
    together, reordered = noise_fractions([5, 6, 7]), noise_fractions([7, 9, 5, 1])
    assert torch.equal(together[:, [2, 0]], reordered[:, [0, 2]])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_the_nearest_timestep_of_a_noise_fraction():
    objective = VPrediction(snr_shift=1.0)
    alpha, sigma = objective.alpha_sigma(objective.snap(torch.linspace(0, 1, 1001)))
    known = sigma / (alpha + sigma)
    for fraction in (0.0, 0.137, 0.5, 0.761, 1.0):
        t = timesteps_at_noise_fraction(objective, torch.tensor([fraction]))
        a, s = objective.alpha_sigma(t)
        found = (s / (a + s) - fraction).abs()
        assert found <= (known - fraction).abs()[1:].min() + 1e-6


# ---- shapes and collapse ---------------------------------------------------------------------------------------------


def test_slow_clips_have_a_direction_above_half_a_pixel_per_frame():
    """Paths of 9 frames with a slope of 1/3 and 2/3 pixels, upwards, and across the border to the left."""
    rows = torch.tensor([[10 - t // 3 for t in range(9)], [10 - 2 * t // 3 for t in range(9)]])
    columns = torch.full((9,), 5)
    path = torch.stack([rows, columns.expand(2, 9)], dim=2)
    assert shape_metrics._direction(path, (16, 24)).tolist() == [-1, 2]
    wrapped = torch.stack([columns, (3 - torch.arange(9)) % 24], dim=1)[None]
    assert shape_metrics._direction(wrapped, (16, 24)).tolist() == [0]
    assert shape_metrics._direction(wrapped.flip(1), (16, 24)).tolist() == [1]


def test_templates_are_the_shapes_of_the_dataset():
    templates = shape_metrics._templates(16, 16).unflatten(2, (16, 16))
    dataset = MovingShapes("train", 1)
    for index in range(36):
        clip = dataset[index]
        row, column = map(int, clip["id"].rsplit("-", 2)[1:])
        mask = clip["video"][0, clip["labels"]["colour"]] > 0
        assert torch.equal(templates[clip["labels"]["shape"], 16 * row + column] > 0, mask)


def test_clips_of_unequal_height_and_width_are_classified():
    clip = MovingShapes("train", 1)[0]
    video = torch.full((1, 3, 8, 20, 28), -1.0)
    video[0, :, :, 2:18, 6:22] = clip["video"].transpose(0, 1).float() / 127.5 - 1
    found = shape_metrics.classify(video)
    assert found["colour"].item() == clip["labels"]["colour"]
    assert found["shape"].item() == clip["labels"]["shape"]


@pytest.mark.parametrize(("every", "step", "checked"), [(3, 3, True), (3, 4, False), (1, 1, True), (2, 6, True)])
def test_collapse_is_checked_at_multiples_of_every_n_steps(every: int, step: int, checked: bool, monkeypatch):
    monitor, seen = CollapseMonitor(every_n_steps=every, after_steps=9), []
    monkeypatch.setattr(monitor, "_measure", lambda trainer, module, video: seen.append(video) or {"x": torch.ones(())})
    monkeypatch.setattr(monitor, "_log", lambda trainer, metrics: seen.append(sorted(metrics)))
    trainer = SimpleNamespace(global_step=step)
    for _ in range(2):  # batches of accumulated gradients have the same step
        monitor.on_train_batch_end(trainer, None, None, {"video": "clips"}, 0)
    assert seen == (["clips", ["collapse/alarm", "collapse/x"]] if checked else [])


@pytest.mark.parametrize("training", [True, False])
def test_collapse_measures_are_means_over_processes_in_eval_mode(training: bool):
    """The other process measures a value that is larger by 1."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = SimpleNamespace(target_encoder=None)

        def latents(self, video):
            assert not self.training
            return video

    module, reduced = Network().train(training), []
    reduce = lambda value, reduce_op: reduced.append(reduce_op) or value + 0.5  # noqa: E731
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    video = torch.zeros(2, 3, 4)
    video[0, :, 0], video[1, :, 0], video[:, :, 1] = 3.0, -3.0, 4.0
    found = CollapseMonitor()._measure(trainer, module, video)
    assert module.training == training
    assert set(reduced) == {"mean"}
    expected = {"target_std": 0.75, "target_std_min": 0.0, "effective_rank": 1.0, "cross_clip_cosine": 7 / 25}
    assert {name: value.item() - 0.5 for name, value in found.items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("measure", ["std", "rank", "cosine"])
def test_a_measure_at_its_threshold_is_no_collapse(measure: str):
    monitor = CollapseMonitor(patience=1, min_std=0.25, min_rank=3.0, max_cosine=0.75)
    trainer = SimpleNamespace(global_step=1, should_stop=False)
    healthy = {"std": 0.25, "rank": 3.0, "cosine": 0.75}

    def check(**changes: float) -> bool:
        values = {**healthy, **changes}
        names = {"std": "target_std", "rank": "effective_rank", "cosine": "cross_clip_cosine"}
        monitor._update_alarm(trainer, {names[name]: torch.tensor(value) for name, value in values.items()})
        return monitor.alarm

    assert not check()
    with pytest.warns(UserWarning, match="collapse at step 1"):
        assert check(**{measure: healthy[measure] + (0.01 if measure == "cosine" else -0.01)})
    assert check(), "the alarm remains"
    assert not trainer.should_stop
