"""Settings for the whole suite."""

import hypothesis

# No deadline: a slow or shared machine is no bug. Derandomized, so that a commit passes or fails the same everywhere.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
