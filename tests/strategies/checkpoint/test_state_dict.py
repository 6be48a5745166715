"""Optimizer states that do not fit the optimizer are refused in one line."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ravine.strategies import CheckpointError
from ravine.strategies.checkpoint.state_dict import load_full_state


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net.strict_loading = True  # as a LightningModule has it
    return net


def load(net: nn.Module, checkpoint: dict, optimizer: AdamW) -> None:
    load_full_state(net, [optimizer], checkpoint, is_owned=lambda parameter: True, stages=None)


@pytest.fixture
def checkpoint() -> dict:
    net = network()
    optimizer = AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def test_states_of_more_parameters_than_the_optimizer_has_are_refused(checkpoint: dict) -> None:
    net = network()
    with pytest.raises(CheckpointError, match=r"have \[4\] parameters, and .* have \[2\]"):
        load(net, checkpoint, AdamW(net[1].parameters()))


def test_states_of_other_param_groups_are_refused(checkpoint: dict) -> None:
    net = network()
    groups = [{"params": layer.parameters()} for layer in net]
    with pytest.raises(CheckpointError, match=r"1 param groups, and this optimizer has 2"):
        load(net, checkpoint, AdamW(groups))


def test_fitting_states_are_loaded(checkpoint: dict) -> None:
    net = network()
    optimizer = AdamW(net.parameters())
    load(net, checkpoint, optimizer)
    saved = checkpoint["optimizer_states"][0]["state"]
    for i, parameter in enumerate(net.parameters()):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], saved[i]["exp_avg"])
