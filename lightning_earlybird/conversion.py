"""The dense denoiser of a running fit becomes an ensemble of tickets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_earlybird.budget import Target
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.importance import check_finite
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.probe import DenoiserCall
from lightning_earlybird.regions import TimestepPartition, TimestepRegion
from lightning_earlybird.structure import (
    ChannelPlan,
    Norm,
    StructureError,
    TicketSlicer,
    attribute_edits,
    by_reason,
    count_macs,
    count_parameters,
    extract,
    failing_masks,
    trace_plan,
    verify_plan,
)
from lightning_earlybird.tickets import EnsembleRecord, TicketFacts, describe_denoiser
from lightning_earlybird.transition import averaged_modules, forget_scores, replace_denoiser
from lightning_earlybird.transition.optimizers import family
from lightning_earlybird.transition.rehearsal import bare


@dataclass(frozen=True)
class FoundDenoiser:
    """The denoiser as it was found in a training batch, with its verified channel plan.

    Attributes:
        call: One call of it.
        plan: Which channels it has.
        macs: Multiply-accumulate operations for one sample.

    Raises:
        ValueError: The plan has not been verified.
    """

    call: DenoiserCall
    plan: ChannelPlan
    macs: int

    def __post_init__(self) -> None:
        if not self.plan.verified:
            raise ValueError("plan has not been verified; use what verify_plan returns, or FoundDenoiser.trace.")

    @classmethod
    def trace(cls, module: nn.Module, call: DenoiserCall) -> FoundDenoiser:
        """Trace and verify the denoiser that ``call`` names; once per fit.

        Raises:
            MisconfigurationException: Nothing of it can be pruned, or not safely.
        """
        network = unwrap(module.get_submodule(call.name))
        args, kwargs = call.for_network(network)
        try:
            with torch.compiler.set_stance("force_eager"):
                verified = verify_plan(network, trace_plan(network, args, kwargs), args, kwargs)
                macs = count_macs(network, args, kwargs)
        except StructureError as error:
            raise MisconfigurationException(f"denoiser={call.name!r}: {error}") from error
        failed = [entry for entry in verified.plan.frozen if entry.name in verified.failed]
        if failed:
            groups = "group stays" if len(failed) == 1 else "groups stay"
            rank_zero_warn(
                f"denoiser={call.name!r}: {len(failed)} channel {groups} whole, as pruning failed "
                f"verification: {'; '.join(text for _, text in by_reason(failed))}."
            )
        plan = verified.plan
        if plan.data_reads:
            rank_zero_warn(
                f"denoiser={call.name!r}: Python code reads values of tensors ({'; '.join(plan.data_reads[:3])}). If "
                "it decides by them what to compute, only the branch that the first batch took has been verified."
            )
        unknown = f"\nno rule for {', '.join(plan.unknown_operations)}" if plan.unknown_operations else ""
        rank_zero_info(
            f"Early-bird tickets: the denoiser is {call.name!r} ({type(network).__name__}, "
            f"{count_parameters(network):,} parameters, {macs:,} MACs a sample).\n{plan.summary()}{unknown}"
        )
        return cls(call, plan, macs)

    def check_masks(self, module: nn.Module, masks: Mapping[str, TicketMask]) -> None:
        """Try tickets that are narrower than those that verification has tried.

        Args:
            module: The LightningModule.
            masks: What the ticket is called in the error -> its mask.

        Raises:
            MisconfigurationException: A ticket does not compute what the dense network does.
        """
        network = unwrap(module.get_submodule(self.call.name))
        with torch.compiler.set_stance("force_eager"):
            failing = failing_masks(network, self.plan, *self.call.for_network(network), masks)
        for name, problem in failing.items():
            raise MisconfigurationException(
                f"denoiser={self.call.name!r}: at the widths of {name} it computes something else than the dense "
                f"network with the same channels at zero ({problem}), as it does not at moderate widths. Use a lower "
                "sparsity or a larger min_width."
            )


def convert(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    found: FoundDenoiser,
    partition: TimestepPartition,
    masks: Sequence[TicketMask],
    emerged: Mapping[TimestepRegion, int],
    *,
    target: Target = "channels",
    norm: Norm = "shrink",
    initial_weights: Mapping[str, Tensor] | None = None,
) -> TicketEnsemble:
    """Replace the denoiser by its tickets, with everything in the Trainer that depends on it.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, changed in place.
        found: The denoiser.
        partition: The regions that the tickets serve.
        masks: One mask a region.
        emerged: Region -> step at which its ticket emerged; regions that are missing were taken at the search limit.
        target: What the regions' sparsities count, for the record.
        norm: What becomes of group norms; see :func:`~lightning_earlybird.structure.extract`.
        initial_weights: The denoiser's state dict at initialisation: tickets restart from it, with fresh optimizer
            state. None keeps what was learned.

    Returns:
        The ensemble that now stands in the denoiser's place, with its record.

    Raises:
        NonFiniteWeightsError: A weight, or an averaged one, is NaN or infinite; nothing has been changed.
    """
    name, plan = found.call.name, found.plan
    dense = unwrap(module.get_submodule(name))
    check_finite(dense)  # not every criterion has looked at the weights
    for average in averaged_modules(trainer):
        check_finite(average.get_submodule(name), "the averaged denoiser")
    slicers = [TicketSlicer(plan, mask) for mask in masks]
    parameters = count_parameters(dense)
    edits, facts = [], []
    # All of the record comes before the dense network leaves, so that tickets and their record are never apart.
    for region, mask in zip(partition, masks, strict=True):
        ticket = extract(dense, plan, mask, norm=norm)
        edits.append(attribute_edits(dense, ticket))
        with torch.compiler.set_stance("force_eager"):
            macs = count_macs(ticket, *found.call.for_network(ticket))
        searched = emerged.get(region)
        facts.append(
            TicketFacts(
                region=region,
                step=trainer.global_step if searched is None else searched,
                emerged=searched is not None or region.sparsity == 0,
                channels=(mask.num_channels, mask.num_kept),
                parameters=(parameters, count_parameters(ticket)),
                macs=(found.macs, macs),
                target=target,
            )
        )
    record = EnsembleRecord(describe_denoiser(dense), tuple(edits), tuple(masks), tuple(facts), found.call.sample_shape)

    def build(network: nn.Module) -> nn.Module:
        if initial_weights is not None:
            network = copy.deepcopy(network)
            network.load_state_dict(initial_weights)
        # A repair (making up for the removed channels in closed form) would act on these networks, before they train.
        tickets = [extract(network, plan, mask, norm=norm) for mask in masks]
        ensemble = TicketEnsemble(tickets, partition, found.call.timesteps)
        ensemble.record = record
        return ensemble

    def inherit(name: str, tensor: Tensor) -> Tensor:
        ticket, dense_name = split_name(name)
        return slicers[ticket].slice(dense_name, tensor)

    if initial_weights is not None:
        forget_training(trainer, dense)
    ensemble = replace_denoiser(trainer, module, name, build, inherit, lambda new: split_name(new)[1])
    assert isinstance(ensemble, TicketEnsemble)
    forget_scores(trainer)
    return ensemble


def forget_training(trainer: pl.Trainer, dense: nn.Module) -> None:
    """Drop the optimizer state and the gradients of weights that are about to be thrown away."""
    for optimizer in trainer.optimizers:
        for member in family(bare(optimizer)):
            for parameter in dense.parameters():
                member.state.pop(parameter, None)
    for parameter in dense.parameters():
        parameter.grad = None


def find_ensemble(module: nn.Module) -> tuple[str, TicketEnsemble] | None:
    """The ensemble in a LightningModule and its dotted name; None while the denoiser is dense."""
    return next(((name, part) for name, part in module.named_modules() if isinstance(part, TicketEnsemble)), None)


def split_name(name: str) -> tuple[int, str]:
    """The ticket's index and the dense name: ``tickets.2.conv_in.weight`` -> ``(2, "conv_in.weight")``."""
    _, ticket, dense_name = name.split(".", 2)
    return int(ticket), dense_name
