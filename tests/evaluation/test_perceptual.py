"""LPIPS: wiring of the package, without its weights."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blueberry_video.evaluation.perceptual import LPIPS


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, first, second):
        return (first - 2 * second).flatten(1).mean(dim=1)


@pytest.mark.parametrize(("weights", "is_random"), [("published", False), ("random", True)])
def test_the_package_receives_network_and_weights(monkeypatch, weights, is_random):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    distance = LPIPS("alex", weights)
    assert distance.network.options == {"net": "alex", "pnet_rand": is_random, "verbose": False}
    first, second = torch.full((2, 3, 4, 4), 5.0), torch.ones(2, 3, 4, 4)
    assert distance(first, second).tolist() == [3, 3]


def test_unknown_weights_raise():
    with pytest.raises(ValueError, match=r"weights='imagenet'"):
        LPIPS(weights="imagenet")


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"lpips.*\[perceptual\]"):
        LPIPS()
