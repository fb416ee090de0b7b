"""Early-bird tickets for diffusion models, found and trained within one Lightning fit.

The method is EB-Diff-Train (Early-Bird Diffusion, arXiv 2504.09606): a dense denoiser trains until its pruning masks
settle, and then becomes one small network per timestep region, each trained only where it is used.
"""

__version__ = "0.1.0"
