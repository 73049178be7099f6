"""Action prediction: the losses against their definitions, what is measured beside them, and clips that do not fit."""

import lightning
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

FRAMES = 6


def world_model(action_dim: int = 5, seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    encoder = VisionTransformer(16, FRAMES, 8, 2, embed_dim=12, depth=1, num_heads=2, images=True)
    return WorldModel(encoder, action_dim, 2, predictor_dim=24, predictor_depth=1, predictor_num_heads=2)


def task(model: WorldModel | None = None, **changes) -> ActionPrediction:
    return ActionPrediction(
        model or world_model(), lambda groups: torch.optim.AdamW(groups, lr=1e-2), constant, **changes
    )


def clips(split: str = "train", size: int = 8, **changes) -> World:
    options = {"num_frames": FRAMES, "image_size": 16, "supersample": 1, "mode": "agent"}
    return World(split, size, **{**options, **changes})


def trainer(tmp_path, **changes) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False, "use_distributed_sampler": False}
    return lightning.Trainer(**quiet, **{**options, "default_root_dir": tmp_path, **changes})


def batch(count: int = 3, **changes) -> dict:
    given = {
        "video": torch.rand(count, 3, FRAMES, 16, 16),
        "actions": torch.randint(0, 5, (count, FRAMES - 1)),
        "states": torch.randn(count, FRAMES, 2),
    }
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_losses_equal_their_definition():
    """Teacher forcing on every frame; a rollout of two steps that feeds its first prediction."""
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


def test_the_loss_of_a_rollout_reaches_its_first_step():
    """Only the second step is scored here, and still the first action has a gradient through the first prediction."""
    model, given = world_model(), batch()
    latents = model.encode_frames(given["video"])
    actions = F.one_hot(given["actions"], 5).float().requires_grad_()
    rolled = model.rollout(latents[:, :1], actions[:, :2], given["states"])
    (rolled[:, 1] - latents[:, 2]).abs().mean().backward()
    assert actions.grad[:, 0].abs().sum() > 0


def test_training_logs_what_it_is_compared_with(tmp_path):
    fit, module = trainer(tmp_path), task()
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
    optimised = {id(parameter) for group in fit.optimizers[0].param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in module.model.predictor.parameters()}


def test_it_learns_where_actions_lead():
    """On frames that an action brightens or darkens: better than copying, and worse with the actions exchanged."""
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
        exchanged = module.shared_step({**given, "actions": 1 - actions}, "val")
    assert values["rollout"] < 0.5 * values["rollout_trivial"]
    assert exchanged["rollout"] > values["rollout_trivial"]


class Patches(Encoder):
    """An encoder of another kind: each patch projected, and nothing else."""

    def __init__(self):
        super().__init__(16, FRAMES, 8, 2, embed_dim=12, images=True)
        self.project = torch.nn.Linear(3 * 2 * 8 * 8, 12)

    def forward(self, video, keep=None):
        tokens = self.project(patchify(self.as_clip(video), self.patch_size).flatten(2))
        return tokens if keep is None else gather_tokens(tokens, keep)


def test_it_takes_any_encoder_of_single_frames(tmp_path):
    fit, frozen = trainer(tmp_path), Patches()
    before = frozen.project.weight.clone()
    fit.fit(task(WorldModel(frozen, 5, 2, 24, 1, 2)), datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert fit.callback_metrics["val/loss"].isfinite()
    assert torch.equal(frozen.project.weight, before)


def test_init_from_loads_the_encoder(tmp_path, capsys):
    other = world_model(seed=7).encoder.state_dict()
    torch.save(other, tmp_path / "encoder.pt")
    module = task()
    module.init_from = tmp_path / "encoder.pt"
    trainer(tmp_path).fit(module, datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert "loaded" in capsys.readouterr().out
    assert all(torch.equal(value, other[name]) for name, value in module.model.encoder.state_dict().items())


def test_it_acts_in_the_procedural_world_at_the_end(tmp_path):
    planner = CrossEntropyPlanner(Discrete(5), samples=10, elites=2, iterations=1)
    loop = ClosedLoop(Simulator(16, supersample=1), planner, episodes=2, max_steps=2, random_tries=1)
    fit = trainer(tmp_path, callbacks=[loop])
    fit.fit(task(), datamodule=DataModule(clips(), clips("val"), batch_size=4))
    assert 0 <= fit.callback_metrics["closed_loop/success"] <= 1
    assert {"closed_loop/success_trivial", "closed_loop/distance"} <= fit.callback_metrics.keys()


def test_tokens_per_clip():
    assert task().tokens_per_clip(batch()) == FRAMES * (4 + 2)
    assert task(repeats=2).tokens_per_clip(batch()) == 2 * FRAMES * (4 + 2)


def test_actions_as_vectors():
    assert action_vectors(torch.tensor([[2, 0]]), 3).tolist() == [[[0, 0, 1], [1, 0, 0]]]
    vectors = torch.randn(2, 4, 3)
    assert torch.equal(action_vectors(vectors, 3), vectors)
    assert prediction_loss(torch.ones(1, 2, 1, 1), torch.zeros(1, 4, 1, 1)) == 1


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        (torch.tensor([[0, 5]]), r"run from 0 to 5 .*model\.action_dim=5 takes the integers 0 to 4"),
        (torch.tensor([[-1, 0]]), "run from -1 to 0"),
        (torch.tensor([[0.5, 0.0]]), "run from 0 to 0 .torch.float32."),
        (torch.zeros(1, 2, 7), r"shape \(1, 2, 7\), but model\.action_dim=5 takes"),
    ],
)
def test_actions_of_another_width_are_refused(actions, text):
    with pytest.raises(ValueError, match=text):
        action_vectors(actions, 5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"actions": None}, "the clips have no actions: action_prediction needs clips of an agent"),
        ({"actions": None, "states": None}, "no actions and no states"),
        ({"video": torch.rand(3, 3, 4, 16, 16)}, "have 4 frames, too few to predict 4 after the first"),
        ({"states": torch.zeros(3, FRAMES, 3)}, r"states have the shape \(3, 5, 3\) but must have \(3, 5, 2\)"),
    ],
)
def test_clips_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        task().shared_step(batch(**changes), "train")


def test_clips_without_an_agent_are_refused_when_training(tmp_path):
    data = DataModule(Sprites("train", 8, FRAMES, 16), Sprites("val", 8, FRAMES, 16), batch_size=4)
    with pytest.raises(ValueError, match="the clips have no actions and no states"):
        trainer(tmp_path).fit(task(), datamodule=data)


@pytest.mark.parametrize("key", ["rollout_steps", "val_rollout_steps"])
def test_rollouts_of_no_step_are_refused(key):
    with pytest.raises(ValueError, match=rf"task\.{key}=0 must be at least 1"):
        task(**{key: 0})
