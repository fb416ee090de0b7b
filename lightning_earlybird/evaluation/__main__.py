"""The command ``python -m lightning_earlybird.evaluation``."""

import sys

from lightning_earlybird.evaluation.command import main

sys.exit(main(sys.argv[1:]))
