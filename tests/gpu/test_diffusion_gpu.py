"""Video diffusion on a GPU: training in bf16, chunk-wise causal sampling, and latents drawn on the CPU."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer

from blueberry_video.config import compose
from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.generation import conditioned_causally, generate_latents
from blueberry_video.diffusion.guidance import ConstantGuidance
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import FlowEuler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.autoencoder.base import Pixels, sample
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.text_encoder.words import WordText

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan", "cogvideox_i2v", "diffusion_forcing"])
def test_two_steps_with_validation_and_media(name: str, tmp_path: Path):
    config = compose(EXPERIMENTS / name / "config.yaml", ["task.sampler.steps=2", "task.num_pictures=2"])
    data, model, optimizer, schedule = map(instantiate, (config.data, config.model, config.optimizer, config.schedule))
    optimization = instantiate(config.task.optimization)(optimizer=optimizer, schedule=schedule)
    task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization)
    trainer = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=2, limit_val_batches=2, val_check_interval=2,
        check_val_every_n_epoch=None, use_distributed_sampler=False, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    losses = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    assert {"val/loss", "val/loss_t95", "val/loss_shuffled", "val/loss_trivial"} <= losses.keys()
    assert all(map(math.isfinite, losses.values()))
    task.to("cuda")  # Lightning moves it back to the CPU
    clips = torch.stack([data.val[index]["video"] for index in range(2)]).cuda()
    batch = {"video": clips, "id": ["a", "b"], "caption": [data.val[index]["caption"] for index in range(2)]}
    batch = task.on_after_batch_transfer(batch, 0)
    with torch.autocast("cuda", torch.bfloat16):
        first, again = task.media(batch), task.media(batch)
    assert first
    for key, pictures in first.items():
        assert pictures.is_cuda
        assert pictures.float().std() > 0
        assert torch.equal(pictures, again[key])


def cogvideox(text_len: int) -> CogVideoX:
    return CogVideoX(
        num_heads=2, head_dim=32, depth=2, in_channels=3, out_channels=3, text_dim=8, text_len=text_len, time_dim=16,
        patch_size=2, num_frames=6, height=16, width=16, positions="rope", causal_chunk=2, zero_init=False,
    )  # fmt: skip


def hunyuan(text_len: int) -> HunyuanVideo:
    return HunyuanVideo(
        in_channels=3, out_channels=3, patch_size=(1, 2, 2), num_heads=2, head_dim=32, depth=1, single_depth=1,
        refiner_depth=1, text_dim=8, pooled_dim=0, rope_axes=(8, 12, 12), causal_chunk=2, zero_init=False,
    )  # fmt: skip


@pytest.mark.parametrize("build", [cogvideox, hunyuan])
def test_cached_sampling_equals_uncached_sampling(build):
    """Without a KV cache, all chunks but the first use block masks; captions have padding."""
    torch.manual_seed(0)
    model = TextToVideo(build(8), WordText(8, 8, ["a", "disc", "moves"]), Pixels()).cuda().eval()
    text, without = model.text(["a disc moves", "a"]), model.text.unconditional(2)
    noise = torch.randn(2, 3, 5, 16, 16, device="cuda")
    settings = FlowEuler(3, shift=3.0), ConstantGuidance(2.0), FlowMatching()
    made = generate_latents(model, text, without, noise, *settings)
    pair = [conditioned_causally(model, part, None) for part in (text, without)]
    with torch.no_grad():
        uncached = generate_causally(*pair, noise, 2, *settings, cached=False)
    assert made.is_cuda
    torch.testing.assert_close(made, uncached, atol=2e-2, rtol=2e-2)  # TF32 products
    on_cpu = model.cpu()
    text, without = on_cpu.text(["a disc moves", "a"]), on_cpu.text.unconditional(2)
    expected = generate_latents(on_cpu, text, without, noise.cpu(), *settings)
    torch.testing.assert_close(made.cpu(), expected, atol=2e-2, rtol=2e-2)


def test_cpu_generator_draws_equal_latents_on_both_devices():
    moments = torch.randn(1, 6, 2, 4, 4)
    drawn = [sample(moments.to(device), torch.Generator().manual_seed(0)).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*drawn)
