"""The card of a saved ensemble: ``README.md`` with what its tickets are, how to use them, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_earlybird.records import EnsembleRecord, TicketFacts
from lightning_earlybird.regions import TimestepPartition, TimestepRegion

CARD_FILE = "README.md"

# What stands between the two is ours and is written anew with each ensemble; all else in the file is its owner's.
BEGIN = b"<!-- lightning-earlybird: what follows is written anew when the ensemble is saved -->"
END = b"<!-- lightning-earlybird: what follows is yours -->"

_FRONT_MATTER = """\
---
library_name: lightning-earlybird
{task}tags:
- lightning-earlybird
- diffusion
- early-bird-tickets
- pruning
---

"""

_OWN_SECTION = """
## Training data, licence, results

Not recorded with the tickets; please fill in.
"""

_CITATION = """\
```bibtex
@inproceedings{whalen2025earlybird,
  title     = {Early-Bird Diffusion: Investigating and Leveraging Timestep-Aware Early-Bird Tickets
               in Diffusion Models for Efficient Training},
  author    = {Whalen, Lexington and Du, Zhenbang and You, Haoran and Li, Chaojian and Li, Sixu
               and Lin, Yingyan (Celine)},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  note      = {arXiv:2504.09606}
}
```
"""


def model_card(
    partition: TimestepPartition, record: EnsembleRecord, version: str, former: bytes | None = None
) -> bytes:
    """The card of an ensemble, in Markdown with the front matter that the Hugging Face hub reads.

    Args:
        partition: The regions.
        record: What is known about the tickets.
        version: Of this package.
        former: The card, or whatever there is under its name, that the new one replaces. Of that, only the part between
            the two marks changes; without the marks nothing does.

    Returns:
        The file's content.
    """
    written = b"\n".join((BEGIN, _written_part(partition, record, version).encode(), END))
    if former is None:
        front = _FRONT_MATTER.format(task=_task(record.denoiser))
        return front.encode() + written + b"\n" + _OWN_SECTION.encode()
    before, begin, rest = former.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + written + after if begin and end else former


def _written_part(partition: TimestepPartition, record: EnsembleRecord, version: str) -> str:
    network = record.denoiser["class"] if record.denoiser else "a network that is not described in the files"
    shape = "" if record.sample_shape is None else f", samples of shape {tuple(record.sample_shape)}"
    overlap = f"Neighbours share an overlap of {partition.overlap:g} in training." if partition.overlap else ""
    return f"""
# A ticket ensemble

{_counted(len(partition))} of one diffusion model ({network}{shape}), one for each region of the time axis:
a network of its own, smaller than the dense one. A sampler calls the one whose region holds the timestep.
{overlap}

{_table(partition, record.facts)}

The sparsity is the fraction that was asked to be removed, of what the column says; channels, parameters and MACs
(multiply-accumulate operations for one sample) are the fractions really removed.

## Use

```python
{_usage(record)}```

## Where they come from

Found and trained by lightning-earlybird {version}{_steps(record.facts)},
an independent implementation of EB-Diff-Train:

{_CITATION}"""


def _table(partition: TimestepPartition, facts: Sequence[TicketFacts]) -> str:
    head = ["ticket", "timesteps", "sparsity", "channels", "parameters", "MACs"]
    lines = [head, ["---", "---", *["---:"] * 4]]
    for number, region in enumerate(partition):
        known = facts[number] if facts else None
        cells = [str(number), _interval(region), f"{region.sparsity:g}"]
        if known is None:
            cells += ["?"] * 3
        else:
            cells[-1] += f" of {'parameters' if known.target == 'params' else known.target.replace('macs', 'MACs')}"
            cells += map(_pair, (known.channels, known.parameters, known.macs))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _counted(tickets: int) -> str:
    return "One ticket" if tickets == 1 else f"{tickets} tickets"


def _pair(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return "not counted"
    dense, kept = pair
    removed = (dense - kept) / dense if dense else 0.0
    return f"{kept:,} of {dense:,} ({removed:.1%} removed)"


def _interval(region: TimestepRegion) -> str:
    return f"[{region.start:g}, {region.stop:g})"


def _usage(record: EnsembleRecord) -> str:
    factory = "" if record.denoiser else ", denoiser=MyNetwork"
    comment = "" if record.denoiser else "  # a function that builds the dense network"
    labelled = _is_labelled(record.denoiser)
    labels = ", class_labels=0" if labelled else ""
    choice = "  # of class 0; a list gives each image its own" if labelled else ""
    return f"""\
from diffusers import DDIMScheduler  # the scheduler that fits your training
from lightning_earlybird import TicketEnsembleSampler

sampler = TicketEnsembleSampler.from_pretrained("PATH"{factory}){comment}
images = sampler.sample(16, scheduler=DDIMScheduler(), num_inference_steps=100{labels}){choice}
"""


def _is_labelled(denoiser: dict[str, Any] | None) -> bool:
    """Whether the network is known to need class labels."""
    if denoiser is None:
        return False
    config = denoiser["config"]
    if denoiser["class"] == "DiTTransformer2DModel":
        return config.get("num_embeds_ada_norm") is not None
    return denoiser["class"] == "UNet2DModel" and config.get("num_class_embeds") is not None


def _steps(facts: Sequence[TicketFacts]) -> str:
    steps = [each.step for each in facts if each.step is not None]
    if not steps:
        return ""
    emerged = "settled" if all(each.emerged for each in facts) else "settled, or the search ended,"
    told = f"step {steps[0]:,}" if len(set(steps)) == 1 else "the steps " + ", ".join(f"{step:,}" for step in steps)
    return f" (masks {emerged} at {told} of the dense training)"


def _task(denoiser: dict[str, Any] | None) -> str:
    """The line for what the hub calls a pipeline's tag, where the network tells it."""
    if denoiser is None or denoiser["class"] != "UNet2DModel":
        return ""
    config = denoiser["config"]
    labelled = config.get("num_class_embeds") or config.get("class_embed_type")
    return "" if labelled else "pipeline_tag: unconditional-image-generation\n"
