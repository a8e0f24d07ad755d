"""Where numbers first are not finite in a model, forwards and backwards."""

import torch
from torch import nn

from tools.replay.watch import Watch, first_bad


class Root(nn.Module):
    """Its gradient at -5 is infinite."""

    def forward(self, x):
        return (x + 5).sqrt()


def model(scale: float) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(Root()), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(1.0)
        layers[1].weight.fill_(scale)
    return layers


def test_the_first_output_that_is_not_finite_is_that_of_the_innermost_module():
    layers = model(3e38)
    with Watch(layers) as watch:
        layers(torch.ones(4, 2))
    found = watch.outputs[first_bad(watch.outputs)]
    assert (found.module, found.kind, found.bad, found.largest) == ("1", "Linear", 8, 0.0)
    assert str(watch.outputs[0]) == "0 (Linear) [4, 2]: finite, up to 3"


def test_a_gradient_breaks_where_the_outputs_are_finite():
    layers = model(-1.0)
    with Watch(layers) as watch:
        layers(torch.ones(4, 2)).sum().backward()
    assert first_bad(watch.outputs) is None
    found = watch.gradients[first_bad(watch.gradients)]
    assert (found.module, found.kind, found.bad) == ("1", "Linear", 8)


def test_hooks_are_gone_afterwards():
    layers = model(1.0)
    with Watch(layers) as watch:
        pass
    layers(torch.ones(4, 2))
    assert watch.outputs == []
