import torch
from models import denoiser, random_mask
from torch import nn

from lightning_earlybird.structure import count_macs, count_parameters, extract, trace_plan


def test_multiply_accumulates_are_those_counted_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 5 * 5, 2))

    assert count_macs(network, (torch.ones(1, 3, 5, 5),)) == 4 * 3 * 9 * 25 + 100 * 2
    assert count_parameters(network) == (4 * 3 * 9 + 4) + (100 * 2 + 2)


def test_attention_counts_whichever_kernel_computes_it() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    # Scores and weighted values: 2 x heads x tokens x tokens x width.
    assert count_macs(Attention(), (torch.ones(1, 4, 10, 8),)) == 2 * 4 * 10 * 10 * 8


def test_tied_parameters_count_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight

    assert count_parameters(network) == 16 + 4 + 4


def test_a_ticket_costs_less_and_counting_disturbs_nothing() -> None:
    dense = denoiser("attention_head_dim=8")
    dense.network.train()
    plan = trace_plan(dense.network, dense.args)
    ticket = extract(dense.network, plan, random_mask(plan, 0))
    random_state = torch.get_rng_state()

    assert count_macs(ticket, dense.args) < count_macs(dense.network, dense.args)
    assert dense.network.training
    assert torch.equal(torch.get_rng_state(), random_state)
