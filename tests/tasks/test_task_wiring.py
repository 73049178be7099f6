"""Settings of tasks reach losses, metrics and pictures: unequal weights, sizes, masks and classes."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.augmentation import Mixing
from blueberry_video.masking import DualMasking, RandomMasking
from blueberry_video.models.autoencoder.base import sample
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.classifier import FrameClassifier, VideoClassifier
from blueberry_video.models.jepa.anticipator import Anticipator
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.world_model import WorldModel
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder, decoder_flops
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant, ramp
from blueberry_video.tasks.action_prediction import ActionPrediction
from blueberry_video.tasks.anticipation import Anticipation, focal_loss
from blueberry_video.tasks.autoencoding import Autoencoding, kl_divergence
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD, Task
from blueberry_video.tasks.classification import Classification, soft_cross_entropy
from blueberry_video.tasks.distillation import Distillation
from blueberry_video.tasks.frame_classification import FrameClassification
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import ClipInput, Optimization

OPTIMIZATION = Optimization(partial(torch.optim.AdamW, lr=1e-2), constant)
CLASSES = {"motion": 4, "shape": 3}
LABELS = {"motion": torch.tensor([3, 0, 3]), "shape": torch.tensor([2, 2, 1])}


def encoder(**changes) -> VisionTransformer:
    sizes = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}
    return VisionTransformer(**{**sizes, "embed_dim": 12, "depth": 1, "num_heads": 2, **changes})


def clips(frames: int = 4, count: int = 3) -> dict:
    video = torch.rand(count, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"video": video, "labels": {name: label[:count] for name, label in LABELS.items()}}


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], retain_graph=True)


# ---- classification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0.25, 0.9])
def test_mixed_labels_have_the_weights_of_their_clips(own: float, monkeypatch: pytest.MonkeyPatch):
    mixing = Mixing()
    monkeypatch.setattr(mixing, "forward", lambda video: (torch.lerp(video.flip(0), video, own), own))
    torch.manual_seed(0)
    module = Classification(VideoClassifier(encoder(), CLASSES, head_init_scale=30.0), OPTIMIZATION, mixing=mixing)
    batch = clips()
    loss = module.shared_step(batch, "train")["loss"]
    mixed = own * batch["video"] + (1 - own) * batch["video"].flip(0)
    logits, expected = module.model(module.normalize(mixed)), []
    for name, labels in LABELS.items():
        parts = [F.cross_entropy(logits[name], each) for each in (labels, labels.flip(0))]
        expected.append(own * parts[0] + (1 - own) * parts[1])
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_both_probes_are_trained_by_separate_losses():
    """The untrained one has the gradient of its cross-entropy, which the value of the loss does not contain."""
    torch.manual_seed(0)
    module = Classification(
        VideoClassifier(encoder(), CLASSES, freeze_encoder=True, head_init_scale=30.0), OPTIMIZATION
    )
    for parameter in module.untrained.head.parameters():
        parameter.data += torch.randn_like(parameter)
    batch = clips()
    loss = module.shared_step(batch, "train")["loss"]
    inputs = module.normalize(batch["video"])
    targets = {name: F.one_hot(label, CLASSES[name]).float() for name, label in LABELS.items()}
    for network in (module.model, module.untrained):
        own = soft_cross_entropy(network(inputs), targets)
        assert (own.item() == pytest.approx(loss.item(), rel=1e-5)) == (network is module.model)
        for found, expected in zip(gradients(loss, network), gradients(own, network), strict=True):
            torch.testing.assert_close(found, expected)


def test_accuracies_of_both_probes_are_separate():
    module = Classification(VideoClassifier(encoder(), CLASSES, freeze_encoder=True), OPTIMIZATION)
    module.model.forward = lambda inputs: {
        name: F.one_hot(label, CLASSES[name]) * 1.0 for name, label in LABELS.items()
    }
    wrong = {"motion": torch.eye(4)[[3, 1, 1]], "shape": torch.eye(3)[[2, 2, 0]]}
    module.untrained.forward = lambda inputs: wrong
    values = module.shared_step(clips(), "train")
    assert values["motion"] == values["shape"] == 1
    assert values["motion_random_init"].item() == pytest.approx(1 / 3)
    assert values["shape_random_init"].item() == pytest.approx(2 / 3)


def test_the_baseline_of_unbalanced_classes_is_the_share_of_the_largest():
    module = Classification(VideoClassifier(encoder(), CLASSES), OPTIMIZATION)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(reversal_pairs={}))
    for labels in (torch.tensor([3, 3, 0]), torch.tensor([2, 3]), torch.tensor([3])):
        batch = clips(count=len(labels))
        module.shared_step({**batch, "labels": {"motion": labels, "shape": labels.clamp(max=2)}}, "val")
    found = module.epoch_metrics({})
    assert found["motion_trivial"].item() == pytest.approx(4 / 6)
    assert found["shape_trivial"].item() == pytest.approx(5 / 6)
    module.shared_step(clips(), "train")
    assert module.epoch_metrics({}) == {}, "training batches do not count"


def test_the_shuffled_control_has_the_accuracy_of_shuffled_frames():
    """A network that reads the index of the first frame from its brightness."""
    module = Classification(
        VideoClassifier(encoder(), {"motion": 4, "shape": 4}), OPTIMIZATION, ClipInput(mean=[0] * 3, std=[1] * 3)
    )
    seen = []

    def forward(inputs):
        seen.append(inputs)
        logits = F.one_hot(inputs[:, 0, 0, 0, 0].long(), 4).float()
        return {"motion": logits, "shape": logits}

    module.model.forward = forward
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(reversal_pairs={"motion": ((0, 3),)}))
    video = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(5, 3, 4, 16, 16)
    labels = torch.tensor([0, 0, 3, 1, 0])
    values = module.shared_step({"video": video, "labels": {"motion": labels, "shape": labels}}, "val")
    first = seen[1][:, 0, 0, 0, 0].long()
    assert values["motion"].item() == pytest.approx(3 / 5)
    assert values["motion_shuffled"].item() == pytest.approx((first == labels).float().mean().item())
    assert values["motion_within_pairs"].tolist() == [1, 1, 1, 0] or sorted(values["motion_within_pairs"].tolist()) == [
        0,
        1,
        1,
        1,
    ]
    assert values["motion_within_pairs_trivial"] == 0.5
    assert not {"shape_shuffled", "shape_within_pairs"} & values.keys()
    module.shared_step({"video": video[:, :, :1], "labels": {"motion": labels, "shape": labels}}, "val")
    assert len(seen) == 3, "a single frame has no order"


def test_distillation_mixes_labels_and_smooths_them_and_not_the_teacher():
    torch.manual_seed(0)
    student, teacher = (VideoClassifier(encoder(), CLASSES, head_init_scale=30.0) for _ in range(2))
    module = Distillation(student, OPTIMIZATION, teacher, None, temperature=3.0, hard_weight=0.25, label_smoothing=0.4)
    batch = clips()
    values = module.shared_step(batch, "train")
    inputs = module.normalize(batch["video"])
    soft, hard = [], []
    for name, label in LABELS.items():
        own, wanted = student(inputs)[name], teacher(inputs)[name]
        p, q = (wanted / 3).softmax(1), (own / 3).log_softmax(1)
        soft.append(9 * (p * (p.log() - q)).sum(dim=1).mean())
        hard.append(F.cross_entropy(own, label, label_smoothing=0.4))
    torch.testing.assert_close(values["loss_soft"], torch.stack(soft).mean())
    torch.testing.assert_close(values["loss_hard"], torch.stack(hard).mean())
    torch.testing.assert_close(values["loss"], values["loss_soft"] + 0.25 * values["loss_hard"])


# ---- classification of frames ----------------------------------------------------------------------------------------


def test_accuracies_at_the_first_at_the_last_and_at_all_time_steps():
    """Logits with 1, 3 and 2 right answers of 4 at the three time steps of 6 frames."""
    module = FrameClassification(FrameClassifier(encoder(num_frames=6), {"motion": 3}), OPTIMIZATION)
    labels = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0], [2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 1, 1]])
    answers = torch.tensor([[1, 1, 2], [1, 1, 2], [0, 0, 1], [1, 0, 1]])
    module.model.forward = lambda inputs: {"motion": F.one_hot(answers, 3).float()}
    batch = {"video": torch.rand(4, 3, 6, 16, 16), "labels": {"motion": labels}}
    values = module.shared_step(batch, "val")
    assert [values[f"motion{name}"].item() for name in ("_first", "", "_last")] == pytest.approx([1 / 4, 6 / 12, 2 / 4])
    wrong_loss, right_loss = (-torch.tensor([0.0, 1.0, 0.0]).log_softmax(0)[i] for i in (0, 1))
    assert values["loss"].item() == pytest.approx((0.5 * wrong_loss + 0.5 * right_loss).item())
    assert module.epoch_metrics({})["motion_trivial"].item() == pytest.approx(5 / 12)
    module.shared_step(batch, "train")
    assert module.epoch_metrics({}) == {}


# ---- anticipation ----------------------------------------------------------------------------------------------------


def anticipation(freeze: bool = True, **changes) -> Anticipation:
    torch.manual_seed(0)
    predictor = {"predictor_dim": 12, "predictor_depth": 1, "predictor_num_heads": 2, "num_mask_tokens": 2}
    network = encoder(num_frames=8, positions="rope_3d")
    model = Anticipator(network, CLASSES, **predictor, num_heads=2, pool_depth=1, freeze=freeze)
    return Anticipation(model, OPTIMIZATION, **{"seen": 4, "gap": (2, 2), "val_gap": 2, "recall_at": 2, **changes})


def test_the_focal_loss_has_the_settings_of_the_task_and_trains_both_heads():
    module = anticipation(alpha=0.9, gamma=0.5)
    for parameter in module.untrained.head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.untrained.eval(), module.model.eval()
    batch = clips(frames=8)
    loss = module.shared_step(batch, "train")["loss"]
    inputs, skip = module.normalize(batch["video"][:, :, 2:6]), torch.tensor([1, 1, 1])
    for network in (module.model, module.untrained):
        logits = network(inputs, skip)
        own = sum(focal_loss(logits[name], LABELS[name], 0.9, 0.5) for name in CLASSES)
        if network is module.model:
            torch.testing.assert_close(loss, own)
        for found, expected in zip(gradients(loss, network), gradients(own, network), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("recall_at", "share"), [(1, 1 / 2), (2, 1.0), (3, 1.0)])
def test_baselines_of_unbalanced_classes_and_counts_of_one_epoch(recall_at: int, share: float):
    module = anticipation(recall_at=recall_at)
    reduce = SimpleNamespace(reduce=lambda value, reduce_op: value)
    module._trainer = SimpleNamespace(strategy=reduce, datamodule=SimpleNamespace(reversal_pairs={}))
    for _ in range(2):
        module.shared_step(clips(frames=8), "val")
        module.shared_step(clips(frames=8, count=1), "val")
        module.shared_step(clips(frames=8, count=2), "train")
        values = module.epoch_metrics({})
        assert values["motion_trivial"].item() == pytest.approx(3 / 4)  # labels 3, 0, 3 and 3
        assert values["shape_trivial"].item() == pytest.approx(3 / 4)  # labels 2, 2, 1 and 2
        assert values["motion_recall_trivial"].item() == pytest.approx(share)


def test_least_and_largest_settings_of_anticipation():
    module = anticipation(seen=2, gap=(0, 6), val_gap=0, recall_at=1, alpha=1.0, gamma=0.0)
    assert module._gaps(3, "val").tolist() == [0, 0, 0]
    assert module.before(torch.arange(8.0).view(1, 1, 8, 1, 1), torch.tensor([6])).flatten().tolist() == [0, 1]
    anticipation(seen=8, gap=(0, 0), val_gap=0, alpha=0.0)
    for changes in (
        {"alpha": 1.1},
        {"alpha": -0.1},
        {"gamma": -0.5},
        {"seen": 0},
        {"gap": (-1, 2)},
        {"gap": (1, 2, 3)},
    ):
        key = next(iter(changes))
        with pytest.raises(ValueError, match=rf"task\.{key}="):
            anticipation(**changes)
    with pytest.raises(ValueError, match=r"num_frames=10\b"):
        anticipation(seen=4, gap=(0, 0), val_gap=5)


def test_recalls_count_the_clips_of_all_processes():
    """The other process has three clips of class 1, of which one is recalled."""
    module, operations = anticipation(recall_at=1), []

    def reduce(counts, reduce_op):
        operations.append(reduce_op)
        other = torch.zeros_like(counts)
        other[0, 1], other[1, 1] = 1, 3
        return counts + other

    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    for network in (module.model, module.untrained):
        network.forward = lambda inputs, skip: {name: torch.eye(size)[[0] * 2] for name, size in CLASSES.items()}
    module._trainer.datamodule = SimpleNamespace(reversal_pairs={})
    batch = clips(frames=8, count=2)
    module.shared_step({**batch, "labels": {name: torch.tensor([0, 2]) for name in CLASSES}}, "val")
    values = module.epoch_metrics({})
    assert set(operations) == {"sum"}
    for name in CLASSES:
        assert values[f"{name}_recall"].item() == pytest.approx((1 + 1 / 3 + 0) / 3)
        assert values[f"{name}_recall_random_init"].item() == pytest.approx((1 + 1 / 3 + 0) / 3)
        assert values[f"{name}_trivial"].item() == pytest.approx(3 / 5)
        assert values[f"{name}_recall_trivial"].item() == pytest.approx(1 / 3)


# ---- action prediction -----------------------------------------------------------------------------------------------


def world(**changes) -> ActionPrediction:
    torch.manual_seed(0)
    network = encoder(num_frames=4, images=True)
    return ActionPrediction(WorldModel(network, 5, 2, 24, 1, 2), OPTIMIZATION, **changes)


@pytest.mark.parametrize(("steps", "val_steps"), [(1, 3), (3, 1)])
def test_rollouts_have_the_steps_of_training_and_of_validation(steps: int, val_steps: int, monkeypatch):
    module, rolled = world(rollout_steps=steps, val_rollout_steps=val_steps), []
    rollout = module.model.rollout
    monkeypatch.setattr(
        module.model, "rollout", lambda *given: rolled.append([x.shape[1] for x in given[:3]]) or rollout(*given)
    )
    batch = {"video": torch.rand(2, 3, 4, 16, 16), "actions": torch.zeros(2, 3).long(), "states": torch.zeros(2, 4, 2)}
    module.shared_step(batch, "train")
    assert rolled == [[1, steps, steps]]
    values = module.shared_step(batch, "val")
    assert rolled[1:] == [[1, steps, steps], [1, val_steps, val_steps]]
    latents = module.model.encode_frames(module.normalize(batch["video"]))
    copied = (latents[:, 1 : val_steps + 1] - latents[:, :1]).abs().mean()
    torch.testing.assert_close(values["rollout_trivial"], copied)
    with pytest.raises(ValueError, match=r"\b3 frames\b.*num_frames=4\b"):
        module.shared_step({**batch, "video": batch["video"][:, :, :3]}, "train")


def test_the_share_of_a_rollout_is_relative_to_its_baseline():
    means = {"rollout": torch.tensor(3.0), "rollout_trivial": torch.tensor(4.0), "loss": torch.tensor(9.0)}
    assert {name: value.item() for name, value in world().epoch_metrics(means).items()} == {"rollout_share": 0.75}


# ---- latent prediction -----------------------------------------------------------------------------------------------


def jepa(**changes) -> LatentPrediction:
    torch.manual_seed(0)
    model = JEPA(encoder(positions="rope_3d"), predictor_dim=12, predictor_depth=1, predictor_num_heads=2)
    options = {"maskings": [RandomMasking(0.25), RandomMasking(0.75)], "momentum": partial(ramp, start=0.9, end=0.9)}
    return LatentPrediction(model, OPTIMIZATION, **{**options, **changes})


def test_pictures_show_the_first_masking_and_num_pictures_clips():
    """Masks of 2 and 6 of 8 patches; visible patches are in the second of four columns."""
    module = jepa(num_pictures=2).eval()
    picture = module.media({"video": clips()["video"] * 0.5 + 0.25})["latents"]
    assert picture.shape == (4, 3, 2 * 17, 4 * 17)
    column = picture.float().unflatten(2, (2, 17)).unflatten(4, (4, 17))[:, :, :, :16, 1, :16]  # (T, C, clip, h, w)
    patches = column.unflatten(0, (2, 2)).unflatten(4, (2, 8)).unflatten(6, (2, 8))
    hidden = (patches == 0).all(dim=7).all(dim=5).all(dim=2).all(dim=1)  # (t, clip, h, w)
    assert hidden.sum(dim=(0, 2, 3)).tolist() == [2, 2]


@pytest.mark.parametrize(
    "changes", [{"clip_after": 1.001}, {"clip_after": -0.001}, {"sigreg_weight": 1.0}, {"sigreg_weight": -0.001}]
)
def test_shares_just_outside_their_range_raise(changes: dict):
    [(key, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"task\.{key}={value}\b"):
        jepa(**changes)


@pytest.mark.parametrize(("step", "end"), [(0, 1.0), (999, 1.01)])
def test_a_momentum_outside_its_range_raises_at_its_first_or_last_step(step: int, end: float):
    schedule = {0: lambda at, total: -0.1 if at == 0 else 0.5, 999: lambda at, total: 1.01 if at == 999 else 0.5}
    with pytest.raises(ValueError, match=rf"task\.momentum=-?[01]\.\d+ at step {step}\b"):
        jepa(momentum=schedule[step])


def test_least_and_largest_settings_of_latent_prediction():
    for value in (0.0, 1.0):
        jepa(clip_after=value, momentum=lambda step, total, value=value: value)
    jepa(sigreg_weight=0.999)


@pytest.mark.parametrize(
    ("step", "after", "clipped"), [(4, 0.5, False), (5, 0.5, True), (0, 0.0, True), (9, 1.0, False)]
)
def test_gradients_are_clipped_from_a_share_of_all_steps(step: int, after: float, clipped: bool, monkeypatch):
    module, calls = jepa(clip_after=after), []
    module._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=10)
    monkeypatch.setattr(Task, "configure_gradient_clipping", lambda self, *given, **more: calls.append((given, more)))
    module.configure_gradient_clipping("optimizer", 0.5, gradient_clip_algorithm="norm")
    assert calls == ([(("optimizer", 0.5), {"gradient_clip_algorithm": "norm"})] if clipped else [])


# ---- masked pixels ---------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_targets_and_of_all_masked_tokens():
    """4 of 8 tokens are visible, 2 are targets."""
    torch.manual_seed(0)
    masking = DualMasking(RandomMasking(0.5), 0.75)
    module = MaskedPixels(MaskedAutoencoder(encoder(), 12, 1, 1), OPTIMIZATION, masking)
    module.setup("validate")
    keep, target, _ = masking(1, (2, 2, 2), torch.Generator().manual_seed(0))
    found = module.epoch_metrics({})
    for name, count in (("decoder_mflops", target.shape[1]), ("decoder_mflops_full", 8 - keep.shape[1])):
        assert found[name].item() == pytest.approx(decoder_flops(module.model, keep.shape[1], count) / 1e6)
    assert found["decoder_mflops"] < found["decoder_mflops_full"]


def test_the_best_baseline_is_the_least_of_clips_and_of_images():
    module = MaskedPixels(MaskedAutoencoder(encoder(), 12, 1, 1), OPTIMIZATION, RandomMasking(0.5))
    numbers = {"loss": 3.0, "loss_trivial_zero": 6.0, "loss_trivial_mean": 5.0, "loss_trivial_nearest": 4.0}
    numbers |= {"loss_image": 1.0, "loss_trivial_zero_image": 2.0, "loss_trivial_mean_image": 4.0}
    numbers |= {"loss_trivial_nearest_image": 8.0}
    found = module.epoch_metrics({name: torch.tensor(value) for name, value in numbers.items()})
    expected = {"loss_trivial": 4.0, "loss_share": 0.75, "loss_trivial_image": 2.0, "loss_share_image": 0.5}
    assert {name: value.item() for name, value in found.items()} == expected


# ---- autoencoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_latents_are_sampled_and_tracked_in_training_alone(loss, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = CausalVideoVAE(channels=4, dims=(8, 16), patch_size=4, time_stride=2)
    module, tracked = Autoencoding(model, OPTIMIZATION, loss=loss, kl_weight=0.5), []
    monkeypatch.setattr(model, "track", lambda latents: tracked.append(latents))
    batch = {"video": torch.rand(2, 3, 5, 16, 16)}
    video = batch["video"] * 2 - 1
    moments = model.encode(video)
    for stage in ("train", "val", "test"):
        torch.manual_seed(1)
        values = module.shared_step(batch, stage)
        torch.manual_seed(1)
        latents = sample(moments) if stage == "train" else moments[:, :4]
        error = model.reconstruct(latents) - video
        expected = error.abs().mean() if loss == "l1" else error.square().mean()
        torch.testing.assert_close(values["reconstruction"], expected)
        torch.testing.assert_close(values["loss"], expected + 0.5 * kl_divergence(moments))
    assert len(tracked) == 1


def test_the_best_baseline_has_the_least_error_and_the_largest_psnr():
    module = Autoencoding(CausalVideoVAE(channels=4, dims=(8, 16), patch_size=4, time_stride=2), OPTIMIZATION)
    numbers = {"reconstruction": 1.0, "reconstruction_trivial_mean": 5.0, "reconstruction_trivial_still": 2.0}
    numbers |= {"reconstruction_trivial_blocks": 4.0, "psnr_trivial_mean": 9.0, "psnr_trivial_still": 20.0}
    found = module.epoch_metrics({name: torch.tensor(v) for name, v in {**numbers, "psnr_trivial_blocks": 7.0}.items()})
    expected = {"reconstruction_trivial": 2.0, "reconstruction_share": 0.5, "psnr_trivial": 20.0}
    assert {name: value.item() for name, value in found.items()} == expected


def test_tokens_of_a_clip_count_its_repeats():
    model = CausalVideoVAE(channels=4, dims=(8, 16), patch_size=4, time_stride=2)
    module = Autoencoding(model, OPTIMIZATION, ClipInput(repeats=3))
    assert module.tokens_per_clip({"video": torch.zeros(2, 3, 5, 16, 24)}) == 3 * (3 * 2 * 3)


# ---- base ------------------------------------------------------------------------------------------------------------


class Plain(Task):
    """Task that records the stages in which weights are loaded."""

    def shared_step(self, batch, stage):
        return {"loss": batch["video"].mean(), "clip": batch["video"].mean(dim=(1, 2, 3, 4))}

    def load_weights(self, path):
        self.loaded = [*getattr(self, "loaded", []), path]
        return "loaded"


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_weights_are_loaded_before_training_alone(stage: str):
    module = Plain(nn.Linear(2, 2), Optimization(torch.optim.SGD, constant, init_from="weights.pt"))
    module.setup(stage)
    assert getattr(module, "loaded", []) == (["weights.pt"] if stage == "fit" else [])


def test_every_stage_has_its_name_and_training_its_copies_and_augmentation():
    seen = []

    class Named(Plain):
        def shared_step(self, batch, stage):
            seen.append((stage, batch["video"].mean().item(), len(batch["video"])))
            return {"loss": batch["video"].mean()}

    module = Named(nn.Linear(2, 2), OPTIMIZATION, ClipInput(nn.Threshold(5.0, 0.5), repeats=2))
    module.log = module.log_dict = lambda *_, **__: None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, num_training_batches=2, optimizers=[optimizer])
    batch = {"video": torch.ones(3, 1, 2, 1, 1)}
    module.training_step(batch, 0)
    module.validation_step(batch, 0)
    module.test_step(batch, 0)
    assert seen == [("train", 0.5, 6), ("val", 1.0, 3), ("test", 1.0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clips_have_the_dtype_of_the_task(dtype: torch.dtype):
    module = Plain(nn.Linear(2, 2), OPTIMIZATION).to(dtype)
    video = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    found = module.on_after_batch_transfer({"video": video, "id": ["a"]}, 0)
    assert found["video"].shape == (1, 1, 3, 1, 1)
    assert found["video"].dtype == dtype
    torch.testing.assert_close(found["video"].flatten().float(), torch.tensor([0, 0.2, 1]), atol=2e-3, rtol=0)
    assert found["id"] == ["a"]


def test_the_schedule_ends_at_its_last_step_and_starts_at_its_first():
    """Lightning steps the scheduler once more after the last step."""
    calls = []

    def schedule(step: int, total: int) -> float:
        calls.append((step, total))
        return 0.5

    optimization = Optimization(partial(torch.optim.SGD, lr=0.25), schedule)
    module = Plain(nn.Linear(2, 2), optimization)
    module._decayed = {name for name, _ in module.named_parameters()}
    module._trainer = SimpleNamespace(estimated_stepping_batches=3.0)
    found = module.configure_optimizers()
    assert found["lr_scheduler"]["interval"] == "step"
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert optimizer.param_groups[0]["lr"] == 0.125
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert calls == [(step, 3) for step in (0, 1, 2, 2) for _ in range(2)]  # two parameter groups


def test_normalization_defaults_to_imagenet_and_each_of_both_is_separate():
    video = torch.rand(1, 3, 2, 4, 4)
    for mean, std in ((None, None), ((0.1, 0.2, 0.3), None), (None, (0.5, 0.25, 2.0))):
        module = Plain(nn.Linear(2, 2), OPTIMIZATION, ClipInput(mean=mean, std=std))
        center, scale = (torch.tensor(x).view(3, 1, 1, 1) for x in (mean or IMAGENET_MEAN, std or IMAGENET_STD))
        torch.testing.assert_close(module.normalize(video), (video - center) / scale)


def test_panels_have_one_row_per_clip_and_a_white_line_below_and_to_the_right():
    columns = [torch.full((2, 3, 4, 5, 7), value) for value in (0.0, 0.5)]
    columns[0][1] = 0.25
    picture = Task.panels(columns)
    assert picture.shape == (4, 3, 2 * 6, 2 * 8)
    assert picture.dtype == torch.uint8
    cells = picture.unflatten(2, (2, 6)).unflatten(4, (2, 8))
    assert (cells[:, :, :, 5] == 255).all()
    assert (cells[..., 7] == 255).all()
    inner = cells[:, :, :, :5, :, :7]
    assert inner.amax(dim=(0, 1, 3, 5)).tolist() == inner.amin(dim=(0, 1, 3, 5)).tolist() == [[0, 128], [64, 128]]


def test_means_of_an_epoch_weight_batches_by_their_clips_and_start_anew():
    module, logged = Plain(nn.Linear(2, 2), OPTIMIZATION), []
    module.log_dict = lambda values, **options: logged.append((values, options))
    for start, end, step in (
        (module.on_validation_epoch_start, module.on_validation_epoch_end, module.validation_step),
        (module.on_test_epoch_start, module.on_test_epoch_end, module.test_step),
    ):
        step({"video": torch.full((4, 1, 1, 1, 1), 99.0)}, 0)  # a sanity check
        start()
        step({"video": torch.full((3, 1, 1, 1, 1), 1.0)}, 0)
        step({"video": torch.full((1, 1, 1, 1, 1), 5.0)}, 1)
        end()
    for (values, options), stage in zip(logged, ("val", "test"), strict=True):
        assert {name: value.item() for name, value in values.items()} == {f"{stage}/loss": 2.0, f"{stage}/clip": 2.0}
        assert options == {"sync_dist": True}


# ---- every task ------------------------------------------------------------------------------------------------------


def video_autoencoder(**changes) -> Autoencoding:
    return Autoencoding(CausalVideoVAE(channels=4, dims=(8, 16), patch_size=4, time_stride=2), OPTIMIZATION, **changes)


TASKS = {
    "classification": lambda **changes: Classification(VideoClassifier(encoder(), CLASSES), OPTIMIZATION, **changes),
    "distillation": lambda **changes: Distillation(
        VideoClassifier(encoder(), CLASSES), OPTIMIZATION, VideoClassifier(encoder(), CLASSES), None, **changes
    ),
    "frames": lambda **changes: FrameClassification(FrameClassifier(encoder(), CLASSES), OPTIMIZATION, **changes),
    "anticipation": anticipation,
    "actions": world,
    "latents": jepa,
    "pixels": lambda **changes: MaskedPixels(
        MaskedAutoencoder(encoder(), 12, 1, 1), OPTIMIZATION, RandomMasking(0.5), **changes
    ),
    "autoencoding": video_autoencoder,
}


@pytest.mark.parametrize("name", TASKS)
def test_optimization_and_input_reach_every_task(name: str):
    clip_input = ClipInput(nn.Identity(), repeats=3, image_repeats=2)
    module = TASKS[name](input=clip_input)
    assert module.optimization is OPTIMIZATION
    assert module.input is clip_input
    assert module.augment is clip_input.augment
    assert TASKS[name]().input == ClipInput()
    if module.normalizes:
        other = TASKS[name](input=ClipInput(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)))
        assert other.pixel_mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert other.pixel_std.flatten().tolist() == [1, 2, 4]


PICTURES = {"classification": 1, "distillation": 1, "frames": 1, "anticipation": 2, "latents": 4, "pixels": 3}


@pytest.mark.parametrize("name", [*PICTURES, "autoencoding"])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (9, 3)])
def test_pictures_have_one_row_per_clip_up_to_num_pictures(name: str, count: int, rows: int):
    """A batch of 3 clips."""
    frames = {"anticipation": 8, "autoencoding": 5}.get(name, 4)
    module = TASKS[name](num_pictures=count).eval()
    [picture] = module.media(clips(frames)).values()
    assert picture.shape == (frames, 3, 17 * rows, 17 * PICTURES.get(name, 2))
    assert picture.dtype == torch.uint8
    shown = picture[:, :, :, :17].unflatten(2, (rows, 17))[:, :, :, :16, :16].permute(2, 1, 0, 3, 4)
    assert torch.equal(shown, (clips(frames)["video"][:rows] * 255).round().byte()), "the first column"
