"""What a run prints at its end."""

from typing import Any

import lightning as L

from lightning_earlybird import TimestepAwarePruner


def cost_report(
    pruner: TimestepAwarePruner, trainer: L.Trainer, batch_size: int, search_s: float, total_s: float
) -> str:
    """What the training cost, in multiply-accumulate operations (a backward pass costs about two forward passes).

    Args:
        pruner: The pruner of the fit.
        trainer: Its Trainer.
        batch_size: Samples of one batch on one device.
        search_s: Seconds up to the switch.
        total_s: Seconds of the fit.
    """
    facts, switched_at = pruner.facts, pruner.switched_at or 0
    steps = trainer.global_step - switched_at
    span = facts[-1].region.stop - facts[0].region.start
    plan = getattr(trainer.strategy, "plan", None)
    if plan is None:
        # Timesteps are uniform, so that each ticket gets the share of the samples that is its region's of the axis.
        batches = [steps * trainer.world_size * (f.region.stop - f.region.start) / span for f in facts]
    else:  # every ticket trains on whole batches, one on each of its ranks
        batches = [count * len(plan.assignment.ranks(k)) for k, count in enumerate(plan.steps)]
    per_batch = 3 * batch_size
    dense = per_batch * facts[0].macs[0]
    search = switched_at * trainer.world_size * dense
    tickets = per_batch * sum(count * fact.macs[1] for count, fact in zip(batches, facts, strict=True))
    samples = batch_size * (switched_at * trainer.world_size + sum(batches))
    lines = [
        f"{'training cost':<22}{'steps':>7}{'MACs':>10}{'of all':>8}{'seconds':>9}{'of all':>8}",
        f"{'search (dense)':<22}{switched_at:>7}{search:>10.2e}{search / (search + tickets):>8.0%}"
        f"{search_s:>9.0f}{search_s / total_s:>8.0%}",
        f"{'tickets':<22}{steps:>7}{tickets:>10.2e}{tickets / (search + tickets):>8.0%}"
        f"{total_s - search_s:>9.0f}{1 - search_s / total_s:>8.0%}",
        f"Together {(search + tickets) * batch_size / (samples * dense):.0%} of the MACs of dense training on as many "
        f"samples ({samples:,.0f}).",
    ]
    if plan is not None and trainer.world_size > 1:
        hosted = [plan.assignment.hosted(rank) for rank in range(trainer.world_size)]
        longest = max(sum(per_batch * plan.steps[k] * facts[k].macs[1] for k in own) for own in hosted)
        path = switched_at * dense + longest
        lines.append(
            f"Critical path, the MACs of the busiest of {trainer.world_size} processes: {path:.2e}, "
            f"{path / (search + tickets):.0%} of all."
        )
    return "\n".join(lines)


def score_table(results: list[dict[str, Any]]) -> str:
    """What ``SampleQuality`` measured, a line for each evaluation."""
    names = [name for name in results[-1] if name not in ("step", "epoch", "network", "seconds")]
    lines = [f"{'step':>8}  {'network':<8}{''.join(f'{name:>24}' for name in names)}{'seconds':>9}"]
    for result in results:
        scores = "".join(f"{result.get(name, float('nan')):>24.4f}" for name in names)
        lines.append(f"{result['step']:>8}  {result['network']:<8}{scores}{result['seconds']:>9.0f}")
    return "\n".join(lines)
