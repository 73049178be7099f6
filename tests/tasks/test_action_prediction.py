"""Action prediction: losses against their definitions, logged metrics, and invalid clips."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world import Simulator, World
from blueberry_video.evaluation.closed_loop import ClosedLoop
from blueberry_video.inference.planner import CrossEntropyPlanner, Discrete
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.world_model import WorldModel
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens, patchify
from blueberry_video.optim import constant
from blueberry_video.tasks.action_prediction import ActionPrediction, action_vectors, prediction_loss
from blueberry_video.tasks.settings import ClipInput, Optimization

FRAMES = 6


def world_model(action_dim: int = 5, seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    encoder = VisionTransformer(16, FRAMES, 8, 2, embed_dim=12, depth=1, num_heads=2, images=True)
    return WorldModel(encoder, action_dim, 2, predictor_dim=24, predictor_depth=1, predictor_num_heads=2)


def task(model: WorldModel | None = None, init_from: Path | None = None, **changes) -> ActionPrediction:
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-2), constant, init_from=init_from)
    return ActionPrediction(model or world_model(), optimization, **changes)


def clips(split: str = "train", size: int = 8, **changes) -> World:
    options = {"num_frames": FRAMES, "image_size": 16, "supersample": 1, "mode": "agent"}
    return World(split, size, **{**options, **changes})


def batch(count: int = 3, **changes) -> dict:
    given = {
        "video": torch.rand(count, 3, FRAMES, 16, 16),
        "actions": torch.randint(0, 5, (count, FRAMES - 1)),
        "states": torch.randn(count, FRAMES, 2),
    }
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_losses_equal_their_definition():
    """Teacher forcing on every frame, and a rollout of two steps on its own first prediction."""
    module, given = task(), batch()
    values = module.shared_step(given, "val")
    model, actions = module.model, F.one_hot(given["actions"], 5).float()
    latents = torch.stack(
        [F.layer_norm(model.encoder(module.normalize(given["video"][:, :, t : t + 1])), (12,)) for t in range(FRAMES)],
        dim=1,
    )
    one_step = [
        (model(latents[:, : t + 2], actions[:, : t + 1], given["states"][:, : t + 1])[:, -1] - latents[:, t + 1]).abs()
        for t in range(FRAMES - 1)
    ]
    assert values["loss_one_step"].item() == pytest.approx(torch.stack(one_step).mean().item(), rel=1e-4)
    frames = latents[:, :1]
    for t in range(4):
        padded = torch.cat([frames, latents[:, :1]], dim=1)
        predicted = model(padded, actions[:, : t + 1], given["states"][:, : t + 1])[:, -1:]
        frames = torch.cat([frames, predicted], dim=1)
    away = (frames[:, 1:] - latents[:, 1:5]).abs()
    assert values["loss_rollout"].item() == pytest.approx(away[:, :2].mean().item(), rel=1e-4)
    assert values["rollout"].item() == pytest.approx(away.mean().item(), rel=1e-4)
    assert values["loss"].item() == pytest.approx((values["loss_one_step"] + values["loss_rollout"]).item())
    copied = (latents[:, 1:5] - latents[:, :1]).abs().mean()
    assert values["rollout_trivial"].item() == pytest.approx(copied.item(), rel=1e-4)
    repeated = (latents[:, 1:] - latents[:, :-1]).abs().mean()
    assert values["loss_one_step_trivial"].item() == pytest.approx(repeated.item(), rel=1e-4)


def test_the_rollout_loss_has_a_gradient_through_its_first_step():
    """Only the second step is in the loss; the first action has a gradient through the first prediction."""
    model, given = world_model(), batch()
    latents = model.encode_frames(given["video"])
    actions = F.one_hot(given["actions"], 5).float().requires_grad_()
    rolled = model.rollout(latents[:, :1], actions[:, :2], given["states"])
    (rolled[:, 1] - latents[:, 2]).abs().mean().backward()
    assert actions.grad[:, 0].abs().sum() > 0


def test_training_logs_metrics_and_baselines_and_trains_the_predictor_only(trainer):
    fit, module = trainer(), task()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit.fit(module, datamodule=DataModule(clips(), clips("val"), batch_size=4))
    logged = fit.logged_metrics | fit.callback_metrics
    assert {"train/loss", "train/loss_one_step", "train/loss_rollout", "val/loss"} <= logged.keys()
    assert {"val/loss_one_step_trivial", "val/rollout", "val/rollout_trivial"} <= logged.keys()
    assert not {"train/rollout", "train/rollout_trivial"} & logged.keys()
    assert logged["val/rollout_share"].item() == pytest.approx(
        (logged["val/rollout"] / logged["val/rollout_trivial"]).item()
    )
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name
    optimized = {id(parameter) for group in fit.optimizers[0].param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in module.model.predictor.parameters()}


def test_predictions_depend_on_the_actions():
    """Each action brightens or darkens the frames: better than copying, and worse with swapped actions."""
    torch.manual_seed(0)
    actions = torch.randint(0, 2, (24, FRAMES - 1))
    level = F.pad((2 * actions - 1).cumsum(dim=1), (1, 0)) * 0.3 + 0.5
    shade = torch.linspace(0.2, 1.0, 16).view(1, 1, 1, 1, 16)
    video = (level[:, None, :, None, None] * shade).expand(-1, 3, -1, 16, -1)
    given = {"video": video, "actions": actions, "states": torch.zeros(24, FRAMES, 2)}
    module = task(world_model(2))
    optimizer = torch.optim.AdamW(module.model.predictor.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        module.shared_step(given, "train")["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        values = module.shared_step(given, "val")
        swapped = module.shared_step({**given, "actions": 1 - actions}, "val")
    assert values["rollout"] < 0.5 * values["rollout_trivial"]
    assert swapped["rollout"] > values["rollout_trivial"]


class Patches(Encoder):
    """Encoder that only projects patches."""

    def __init__(self):
        super().__init__(16, FRAMES, 8, 2, embed_dim=12, images=True)
        self.project = torch.nn.Linear(3 * 2 * 8 * 8, 12)

    def forward(self, video, keep=None):
        tokens = self.project(patchify(self.as_clip(video), self.patch_size).flatten(2))
        return tokens if keep is None else gather_tokens(tokens, keep)


def test_any_frozen_encoder_of_single_frames_works(trainer):
    fit, frozen = trainer(), Patches()
    before = frozen.project.weight.clone()
    fit.fit(task(WorldModel(frozen, 5, 2, 24, 1, 2)), datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert fit.callback_metrics["val/loss"].isfinite()
    assert torch.equal(frozen.project.weight, before)


def test_init_from_loads_the_encoder(tmp_path, capsys, trainer):
    other = world_model(seed=7).encoder.state_dict()
    torch.save(other, tmp_path / "encoder.pt")
    module = task(init_from=tmp_path / "encoder.pt")
    trainer().fit(module, datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert str(tmp_path / "encoder.pt") in capsys.readouterr().out
    assert all(torch.equal(value, other[name]) for name, value in module.model.encoder.state_dict().items())


def test_closed_loop_runs_at_the_end_of_training(trainer):
    planner = CrossEntropyPlanner(Discrete(5), samples=10, elites=2, iterations=1)
    loop = ClosedLoop(Simulator(16, supersample=1), planner, episodes=2, max_steps=2, random_tries=1)
    fit = trainer(loop)
    fit.fit(task(), datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert 0 <= fit.callback_metrics["closed_loop/success"] <= 1
    assert {"closed_loop/success_trivial", "closed_loop/distance"} <= fit.callback_metrics.keys()


def test_tokens_per_clip():
    assert task().tokens_per_clip(batch()) == FRAMES * (4 + 2)
    assert task(input=ClipInput(repeats=2)).tokens_per_clip(batch()) == 2 * FRAMES * (4 + 2)


def test_actions_as_vectors():
    assert action_vectors(torch.tensor([[2, 0]]), 3).tolist() == [[[0, 0, 1], [1, 0, 0]]]
    vectors = torch.randn(2, 4, 3)
    assert torch.equal(action_vectors(vectors, 3), vectors)
    assert prediction_loss(torch.ones(1, 2, 1, 1), torch.zeros(1, 4, 1, 1)) == 1


@pytest.mark.parametrize(
    ("actions", "pattern"),
    [
        (torch.tensor([[0, 5]]), r"(?s)(?=.*\b0\b)(?=.*\b4\b)(?=.*model\.action_dim=5)"),
        (torch.tensor([[-1, 0]]), r"(?s)(?=.*-1\b)(?=.*model\.action_dim=5)"),
        (torch.tensor([[0.5, 0.0]]), r"(?s)(?=.*torch\.float32)(?=.*model\.action_dim=5)"),
        (torch.zeros(1, 2, 7), r"(?s)(?=.*\(1, 2, 7\))(?=.*model\.action_dim=5)"),
    ],
)
def test_actions_that_do_not_match_action_dim_raise(actions, pattern):
    with pytest.raises(ValueError, match=pattern):
        action_vectors(actions, 5)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"actions": None}, r"(?s)^(?!.*states)(?=.*actions)(?=.*data=world_agent)"),
        ({"actions": None, "states": None}, r"(?s)(?=.*actions)(?=.*states)(?=.*data=world_agent)"),
        ({"video": torch.rand(3, 3, 4, 16, 16)}, r"(?s)(?=.*\b4\b)(?=.*num_frames=5)(?=.*task\.val_rollout_steps)"),
        ({"states": torch.zeros(3, FRAMES, 3)}, r"(?s)(?=.*states)(?=.*\(3, 5, 3\))(?=.*\(3, 5, 2\))"),
    ],
)
def test_clips_that_do_not_fit_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        task().shared_step(batch(**changes), "train")


def test_training_on_clips_without_an_agent_raises(trainer):
    data = DataModule(Sprites("train", 8, FRAMES, 16), Sprites("val", 8, FRAMES, 16), batch_size=4)
    with pytest.raises(ValueError, match=r"(?s)(?=.*actions)(?=.*states)(?=.*data=world_agent)"):
        trainer().fit(task(), datamodule=data)


@pytest.mark.parametrize("key", ["rollout_steps", "val_rollout_steps"])
def test_rollouts_of_zero_steps_raise(key):
    with pytest.raises(ValueError, match=rf"task\.{key}=0\b"):
        task(**{key: 0})
