"""FSDP2 on two processes: equality with DDP, checkpoints on other numbers of processes, resuming, damage."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fsdp_ranks
from blueberry_video.experiment import checkpoint as checkpoints
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO
from blueberry_video.parallel.sharded_checkpoint import read_shards, shards_fault

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the folders of the run in one process, which is killed while it saves, and of those in two.

    All tests read them: three processes import PyTorch and Lightning, which takes half of the time.
    """
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    process = torch.multiprocessing.get_context("spawn").Process(target=fsdp_ranks.one, args=(str(one), True))
    process.start()
    process.join()
    assert process.exitcode == -9
    torch.multiprocessing.spawn(fsdp_ranks.work, (str(two), str(one)), nprocs=2)
    return one, two


@pytest.fixture(scope="module")
def results(folders: tuple[Path, Path]) -> dict[str, Any]:
    return torch.load(folders[1] / "results.pt", weights_only=False)


def final(folder: Path, suffix: str = "ckpt", step: int = fsdp_ranks.STEPS) -> dict[str, torch.Tensor]:
    return fsdp_ranks.tensors(folder / f"checkpoints/step_{step:08d}.{suffix}")


def assert_equal(found: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        if tolerance == 0:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ["jepa", "lora", "classifier"])
def test_fsdp_equals_ddp(folders, results, name):
    """Losses, gradient norms, metrics, weights, averages and optimizer states, with clipping and an EMA."""
    ddp, fsdp = results[f"{name}-ddp"], results[f"{name}-fsdp"]
    assert min(ddp["norms"]) > 0.05  # gradients are clipped
    for key in ("losses", "norms"):
        assert fsdp[key] == pytest.approx(ddp[key], rel=1e-5, abs=1e-5)
    assert fsdp["metrics"] == pytest.approx(ddp["metrics"], rel=1e-4, abs=1e-5)
    found, expected = final(folders[1] / f"{name}-fsdp"), final(folders[1] / f"{name}-ddp")
    assert any("exp_avg_sq" in key for key in found)
    assert any(key.startswith("/current_model_state") for key in found)
    assert_equal(found, expected, 1e-5)


def test_evaluations_of_the_first_process_alone_are_made(folders, results):
    assert {"sampling/colour", "sampling/shape_trivial"} <= results["lora-fsdp"]["metrics"].keys()
    for step in (2, 4):
        media = [folders[1] / f"lora-{kind}/media/samples_{step:08d}.png" for kind in ("ddp", "fsdp")]
        assert media[0].read_bytes() == media[1].read_bytes()
    assert "collapse/ema_distance" in results["jepa-fsdp"]["metrics"]


def test_activation_checkpointing_and_compiled_blocks_change_nothing(results):
    for key in ("losses", "norms"):
        assert results["compiled-fsdp"][key] == pytest.approx(results["lora-fsdp"][key], rel=1e-5, abs=1e-5)


def test_bf16_mixed_equals_ddp(folders, results):
    assert results["bf16-fsdp"]["losses"] == pytest.approx(results["bf16-ddp"]["losses"], rel=1e-3)
    state = AtomicCheckpointIO().load_checkpoint(folders[1] / "bf16-fsdp/checkpoints/step_00000004.ckpt")
    assert {value.dtype for value in state["state_dict"].values()} == {torch.float32}


def test_blocks_are_gathered_in_bfloat16_and_gradients_reduced_in_float32(results):
    """On CUDA, ``trainer.precision=bf16-mixed`` gathers blocks so."""
    found = results["narrow"]
    assert found["dtypes"] == [torch.bfloat16] * 2
    assert set(found["inside"].values()) == {torch.bfloat16}
    assert found["outside"] == {torch.float32}
    losses, module = [], fsdp_ranks.Narrow()
    module.load_state_dict(found["start"])
    for seed in range(2):
        losses.append(module(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().mean())
    torch.stack(losses).mean().backward()
    for name, weight in module.named_parameters():
        assert found["gradients"][name].dtype == torch.float32
        torch.testing.assert_close(found["gradients"][name], weight.grad, rtol=0.03, atol=0.01)


def test_a_sharded_checkpoint_has_the_contents_of_a_whole_one(folders):
    path = folders[1] / "jepa-sharded/checkpoints/step_00000004.shards"
    assert len(list(path.glob("*.safetensors"))) == 2
    assert_equal(final(folders[1] / "jepa-sharded", "shards"), final(folders[1] / "jepa-fsdp"))


@pytest.mark.parametrize("name", ["jepa-resumed", "jepa-full-resumed"])
def test_a_resumed_run_equals_the_uninterrupted_one(folders, results, name):
    assert results[name]["losses"] == results["jepa-sharded"]["losses"][2:]
    assert_equal(final(folders[1] / name, "shards"), final(folders[1] / "jepa-sharded", "shards"))


def test_a_checkpoint_of_one_process_is_resumed_by_two(folders, results):
    """The classifier has no random numbers, so that the steps do not depend on the number of processes."""
    expected = results["classifier-fsdp"]
    for key in ("losses", "norms"):
        assert results["from-one"][key] == pytest.approx(expected[key][2:], rel=1e-5, abs=1e-5)
    assert_equal(final(folders[1] / "from-one", "shards"), final(folders[1] / "classifier-fsdp"), 1e-5)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(folders, results, tmp_path):
    file = folders[1] / "from-one/checkpoints/step_00000004.shards"
    found = fsdp_ranks.train(fsdp_ranks.classifier(), tmp_path, "auto", processes=1, resume=file, steps=5)
    assert len(found["losses"]) == 1
    kept = AtomicCheckpointIO().load_checkpoint(folders[1] / "classifier-fsdp/checkpoints/step_00000004.ckpt")
    AtomicCheckpointIO().save_checkpoint(kept, tmp_path / "step_00000004.ckpt")
    same = tmp_path / "step_00000004.ckpt"
    expected = fsdp_ranks.train(fsdp_ranks.classifier(), tmp_path / "whole", "auto", processes=1, resume=same, steps=5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_killed_save_leaves_the_checkpoint_before(folders):
    folder = folders[0] / "checkpoints"
    assert (folder / ".step_00000004.shards.tmp").is_dir()
    assert checkpoints.latest_good_checkpoint(folder) == folder / "step_00000002.shards"


@pytest.fixture
def run(folders, tmp_path) -> Path:
    shutil.copytree(folders[1] / "jepa-sharded", tmp_path / "run")
    return tmp_path / "run/checkpoints"


@pytest.mark.parametrize("fault", ["truncate", "flip", "remove", "checksums"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, fault):
    newest = run / "step_00000004.shards"
    file = sorted(newest.glob("shard-*"))[-1] if fault != "checksums" else newest / "checksums.sha256"
    content = bytearray(file.read_bytes())
    if fault == "flip":
        content[-5] ^= 1
    if fault == "remove":
        file.unlink()
    else:
        file.write_bytes(content if fault == "flip" else content[: len(content) // 2])
    assert file.name in str(shards_fault(newest))
    with pytest.warns(UserWarning, match=rf"step_00000002.*step_00000004.*{file.name}"):
        assert checkpoints.latest_good_checkpoint(run) == run / "step_00000002.shards"
    with pytest.raises(ValueError, match=rf"step_00000004\.shards.*{file.name}"):
        AtomicCheckpointIO().load_checkpoint(newest)


def test_the_weights_of_a_sharded_checkpoint_are_consolidated_once(run):
    file = checkpoints.weights_file(run.parent)
    assert file == run / "weights_00000004.ckpt"
    expected = read_shards(run / "step_00000004.shards")["state_dict"]
    assert_equal(AtomicCheckpointIO().load_checkpoint(file)["state_dict"], expected)
    written = file.stat().st_mtime_ns
    assert checkpoints.weights_file(run / "step_00000004.shards") == file
    assert file.stat().st_mtime_ns == written
    assert checkpoints.checkpoint_files(run)[0].name == "step_00000004.shards"
    AtomicCheckpointIO().remove_checkpoint(run / "step_00000004.shards")
    assert sorted(path.name for path in run.glob("[!.]*")) == ["step_00000002.shards"]
    assert not list(run.glob("*4.shards*"))
    assert not list(run.glob(".*.tmp"))
