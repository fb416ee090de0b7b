import torch
from models import denoiser, random_mask
from torch import nn

from lightning_earlybird.structure import WidthCost, count_macs, count_parameters, extract, trace_plan


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


def test_the_width_of_one_head_counts_for_all_where_queries_and_values_are_groups_of_their_own() -> None:
    class LinearAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(*sizes) for sizes in ((5, 16), (5, 16), (5, 32), (32, 5)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out((q @ (k.transpose(-1, -2) @ v)).transpose(1, 2).flatten(2))

    network, args = LinearAttention(), (torch.ones(1, 6, 5),)
    plan = trace_plan(network, args)
    assert [(group.name, group.size, group.rows) for group in plan.groups] == [("q", 16, 4), ("v", 32, 4)]
    macs = WidthCost(plan.macs, plan.groups)

    def layers_and_attention(q: int, v: int) -> int:
        return 6 * 5 * (2 * 4 * q + 2 * 4 * v) + 2 * 4 * q * v * 6

    for q, v in ((4, 8), (3, 5), (1, 7)):
        assert macs(torch.tensor([4 * q, 4 * v])) == layers_and_attention(q, v)


def test_a_ticket_costs_less_and_counting_disturbs_nothing() -> None:
    dense = denoiser("attention_head_dim=8")
    dense.network.train()
    plan = trace_plan(dense.network, dense.args)
    ticket = extract(dense.network, plan, random_mask(plan, 0))
    random_state = torch.get_rng_state()

    assert count_macs(ticket, dense.args) < count_macs(dense.network, dense.args)
    assert dense.network.training
    assert torch.equal(torch.get_rng_state(), random_state)
