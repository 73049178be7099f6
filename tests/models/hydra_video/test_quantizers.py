"""Quantizers: parity with vector-quantize-pytorch, round trips, gradients, codebook statistics and restarts."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from blueberry_video.models.hydra_video.quantizers import FSQ, LFQ, VQ

LEVELS = ((8, 8, 8, 5, 5, 5), (4, 3, 3), (7, 7))


def quantizers():
    torch.manual_seed(0)
    vq = VQ(16, 4)
    vq(torch.randn(64, 4))
    return [FSQ((5, 4, 3)), vq, LFQ(5)]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_equals_the_library(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    vectors = 3 * torch.randn(2, 50, len(levels), generator=torch.Generator().manual_seed(1))
    values, ids = library.FSQ(list(levels))(vectors)
    made = FSQ(levels)(vectors)
    torch.testing.assert_close(made.values, values)
    assert torch.equal(made.ids, ids.long())
    assert made.loss == 0


@pytest.mark.parametrize("bits", [3, 8])
def test_lfq_equals_the_library(bits):
    library = pytest.importorskip("vector_quantize_pytorch")
    vectors = torch.randn(1, 64, bits, generator=torch.Generator().manual_seed(1))
    peer = library.LFQ(
        dim=bits, codebook_size=2**bits, entropy_loss_weight=0.1, diversity_gamma=1.0, commitment_loss_weight=0.25
    )
    values, ids, loss = peer.train()(vectors, inv_temperature=10.0)
    made = LFQ(bits).train()(vectors)
    torch.testing.assert_close(made.values, values)
    assert torch.equal(made.ids, ids.long())
    torch.testing.assert_close(made.loss, loss, atol=1e-4, rtol=0)  # the library clamps probabilities at 1e-5


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: type(q).__name__)
def test_every_id_is_the_id_of_its_code(quantizer):
    ids = torch.arange(quantizer.vocabulary).view(1, -1)
    values = quantizer.eval().values(ids)
    assert values.shape == (1, quantizer.vocabulary, quantizer.dim)
    assert torch.equal(quantizer.nearest(values + 0.01), ids)
    made = quantizer(torch.randn(7, 3, quantizer.dim))
    torch.testing.assert_close(quantizer.values(made.ids), made.values)
    assert made.ids.shape == (7, 3)


def test_every_fsq_code_is_reached():
    quantizer = FSQ((5, 4, 3))
    grids = [torch.linspace(-4, 4, 41) for _ in range(3)]
    made = quantizer(torch.cartesian_prod(*grids))
    assert made.ids.unique().tolist() == list(range(60))


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: type(q).__name__)
def test_gradients_pass_straight_through(quantizer):
    vectors = 0.3 * torch.randn(6, quantizer.dim)
    vectors.requires_grad_()
    weights = torch.randn(6, quantizer.dim)
    (quantizer.eval()(vectors).values * weights).sum().backward()
    expected = weights.clone()
    if isinstance(quantizer, FSQ):  # of tanh and the scale; rounding passes
        levels = torch.tensor([5.0, 4.0, 3.0])
        half, offset = (levels - 1) * 1.001 / 2, torch.tensor([0.0, 0.5, 0.0])
        slope = 1 - (vectors.detach() + (offset / half).atanh()).tanh().square()
        expected = weights * slope * half / (levels // 2)
    torch.testing.assert_close(vectors.grad, expected)


def test_a_codebook_becomes_the_running_average_of_its_vectors():
    quantizer = VQ(2, 1, decay=0.5, restart_below=0.0)
    quantizer.codebook.copy_(torch.tensor([[0.0], [8.0]]))
    quantizer.counts.copy_(torch.tensor([3.0, 1.0]))
    quantizer.sums.copy_(torch.tensor([[0.0], [8.0]]))
    quantizer.initialized.fill_(True)
    made = quantizer(torch.tensor([[2.0], [7.0], [9.0], [9.0]]))
    # counts (3, 1) and (1, 3) -> (2, 2); sums (0, 8) and (2, 25) -> (1, 16.5)
    assert quantizer.counts.tolist() == [2, 2]
    assert quantizer.codebook[:, 0].tolist() == [0.5, 8.25]
    assert made.values[:, 0].tolist() == [0.5, 8.25, 8.25, 8.25]
    assert made.loss.item() == pytest.approx(0.25 * (1.5**2 + 1.25**2 + 2 * 0.75**2) / 4)
    quantizer.eval()(torch.full((9, 1), 5.0))
    assert quantizer.counts.tolist() == [2, 2]  # evaluation does not count


def test_the_first_batch_initializes_the_codebook():
    torch.manual_seed(0)
    centers = torch.tensor([[100.0, 0.0], [0.0, 100.0], [-100.0, 0.0], [0.0, -100.0]])
    quantizer = VQ(4, 2)
    made = quantizer(centers.repeat_interleave(50, 0) + torch.randn(200, 2))
    assert made.ids.unique().numel() >= 3  # k-means may merge two of four
    assert (made.values - centers.repeat_interleave(50, 0)).square().mean() < 2000


def test_dead_codes_are_restarted_at_vectors_of_the_batch():
    torch.manual_seed(0)
    quantizer = VQ(8, 2, decay=0.5, restart_below=0.05)
    quantizer(torch.randn(64, 2))
    for _ in range(30):
        batch = torch.randn(64, 2) + 50
        quantizer(batch)
    assert (quantizer.codebook - 50).abs().max() < 6  # no code is left at the old vectors
    assert quantizer(torch.randn(512, 2) + 50).ids.unique().numel() == 8
    off = VQ(8, 2, decay=0.5, restart_below=0.0)
    off(torch.randn(64, 2))
    for _ in range(30):
        off(torch.randn(64, 2) + 50)
    assert (off.codebook - 50).abs().max() > 40


def test_restarted_codes_are_not_copies_of_the_most_frequent_vector():
    torch.manual_seed(0)
    vectors = torch.cat([torch.zeros(500, 4), torch.randn(12, 4) * 5])[torch.randperm(512)]
    quantizer = VQ(16, 4, restart_below=0.02)
    codebook, counts = torch.zeros(16, 4), torch.zeros(16)
    counts[:4] = 128.0  # twelve dead codes; the others are the frequent vector
    quantizer._restart(codebook, counts, torch.zeros(16, 4), vectors)
    assert (codebook[4:].norm(dim=1) > 0).all()
    assert codebook[4:].unique(dim=0).shape[0] == 12  # every rare vector, once
    again = codebook.clone()
    quantizer._restart(codebook, torch.zeros(16), torch.zeros(16, 4), vectors)
    assert torch.equal(codebook, again)  # no vector is left without its code
    quantizer._restart(codebook, torch.zeros(16), torch.zeros(16, 4), torch.full((20, 4), torch.nan))
    assert torch.equal(codebook, again)  # the loss reports it


def test_codebooks_of_16_bits_are_averaged_in_32():
    torch.manual_seed(0)
    wide, narrow = VQ(4, 2, decay=0.999, restart_below=0.0), VQ(4, 2, decay=0.999, restart_below=0.0)
    narrow.load_state_dict(wide.state_dict())
    narrow.bfloat16()
    for step in range(20):
        batch = (torch.randn(32, 2, generator=torch.Generator().manual_seed(step)) * 4).bfloat16()
        torch.manual_seed(step)
        wide(batch.float())
        torch.manual_seed(step)
        narrow(batch)
    for name in ("codebook", "counts", "sums"):
        torch.testing.assert_close(narrow.state_dict()[name], wide.state_dict()[name])


def _train(rank: int, size: int, folder: str, batch: torch.Tensor) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    quantizer = VQ(8, 3, decay=0.9, restart_below=0.05)
    for step in range(4):
        torch.manual_seed(step + rank)  # draws differ; the restarted codes must not
        quantizer(batch[step].chunk(size)[rank])
    torch.save(quantizer.state_dict(), f"{folder}/{size}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_one_codebook(tmp_path: Path):
    torch.manual_seed(1)
    batch = torch.randn(4, 40, 3) + torch.arange(4)[:, None, None] * 3
    mp.spawn(_train, args=(2, str(tmp_path), batch), nprocs=2)
    first, second = (torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["counts"].sum() == pytest.approx(40, rel=0.5)  # vectors of both processes


def test_entropies_of_lfq():
    quantizer = LFQ(2, inverse_temperature=1e4)
    certain, uniform = quantizer._entropies(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
    assert certain.item() == pytest.approx(0, abs=1e-6)
    assert uniform.item() == pytest.approx(math.log(4))
    certain, uniform = quantizer._entropies(torch.zeros(3, 2))
    assert certain.item() == pytest.approx(math.log(4))
    large = LFQ(12, inverse_temperature=1e4)
    _, uniform = large._entropies(torch.zeros(3, 12))  # two groups of bits
    assert uniform.item() == pytest.approx(12 * math.log(2))


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: type(q).__name__)
def test_ids_out_of_range_raise(quantizer):
    size = quantizer.vocabulary
    for ids in (torch.tensor([0, size]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=rf"vocabulary={size}"):
            quantizer.values(ids)
    with pytest.raises(ValueError, match=r"float32.*integers"):
        quantizer.values(torch.zeros(2))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: FSQ([]), r"levels=\[\]"),
        (lambda: FSQ([8, 2]), r"levels=\[8, 2\]"),
        (lambda: VQ(1, 4), r"vocabulary=1\b"),
        (lambda: VQ(4, 4, decay=1.0), r"decay=1\.0"),
        (lambda: LFQ(0), r"bits=0"),
        (lambda: LFQ(25), r"bits=25"),
    ],
)
def test_settings_out_of_range_raise(build, match):
    with pytest.raises(ValueError, match=match):
        build()
