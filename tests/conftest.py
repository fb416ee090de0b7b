"""Settings for the whole suite."""

import hypothesis
import torch

# The networks are tiny: threads only wait for each other, and results would depend on how many there are.
torch.set_num_threads(1)

# No deadline: a slow or shared machine is no bug. Derandomized, so that a commit passes or fails the same everywhere.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
