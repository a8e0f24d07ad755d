"""What a picture costs to encode, how pictures are spread by it, and how rows find their way."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.schema import VisionConfig
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.costs import autoencoder_flops, vision_flops
from megabagel.models.vision import VisionTower
from megabagel.runtime.balance import imbalance, spread
from megabagel.runtime.exchange import plan_exchange


def _fused_attention(query_shape, key_shape, value_shape, *_, **__) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# the counter does not know the fused kernel of the CPU
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


def _counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("height, width", [(32, 32), (64, 96)])
def test_the_autoencoders_cost_is_what_the_network_computes(height, width):
    config = AutoencoderConfig(ch=8, ch_mult=(1, 2, 4), downsample=4, z_channels=4, num_groups=4)
    network = Autoencoder(config)
    counted = _counted(lambda: network.encode_moments(torch.zeros(1, 3, height, width)))
    assert counted == autoencoder_flops(config, height, width)


def test_the_towers_cost_is_what_the_network_computes():
    config = VisionConfig(48, 2, 4, 100, 14, 16)
    tower = VisionTower(config, torch.float32)
    lengths = [16, 48]  # on a CPU attention pads short pictures; these it does not
    counted = _counted(lambda: tower(torch.zeros(64, 588), torch.arange(64), lengths))
    assert counted == sum(vision_flops(config, length) for length in lengths)


def test_a_picture_of_four_times_the_pixels_costs_more_than_four_times_as_much():
    vae, vit = AutoencoderConfig(), VisionConfig()
    assert 4.0 < autoencoder_flops(vae, 1024, 1024) / autoencoder_flops(vae, 512, 512) < 5.0
    assert 4.0 < vision_flops(vit, 70 * 70) / vision_flops(vit, 35 * 35) < 8.0


def test_the_largest_pieces_are_placed_first():
    costs = [1, 1, 1, 1, 4, 3]
    owners = spread(costs, 3)
    assert owners[4] != owners[5]
    assert imbalance(costs, owners, 3) == pytest.approx(4 / (11 / 3))


def test_no_worker_is_far_above_the_mean_when_pieces_are_many():
    draw = torch.Generator().manual_seed(0)
    costs = torch.randint(1, 100, (400,), generator=draw).tolist()
    assert imbalance(costs, spread(costs, 16), 16) < 1.02
    assert imbalance(costs, [index % 16 for index in range(400)], 16) > 1.1


def test_fewer_pieces_than_workers_and_none_at_all():
    assert sorted(spread([5, 7], 4)) == [0, 1]
    assert imbalance([5, 7], spread([5, 7], 4), 4) == pytest.approx(7 / 3)
    assert spread([], 4) == [] and imbalance([], [], 4) is None


def test_rows_reach_everyone_who_wants_them_in_the_order_of_the_wish():
    owners = torch.tensor([2, 0, 0, 1, 2, 0])
    wanted = [torch.tensor([4, 1, 0]), torch.arange(0), torch.arange(6)]
    held = [(owners == rank).nonzero()[:, 0] for rank in range(3)]
    plans = [plan_exchange(owners, wanted, rank) for rank in range(3)]
    for me, plan in enumerate(plans):
        result = torch.full((plan.length,), -1)
        for other in range(3):
            result[plan.receive[other]] = held[other][plans[other].send[me]]
        assert torch.equal(result, wanted[me])
