"""What each tensor operation does to channel labels.

Five kinds of operation matter: data movement (labels move along), element-wise operations (labels of the operands are
tied), contractions (the contracted labels are tied and vanish, the free ones remain), normalisation (parameters are
tied to what they normalise) and reductions (noted as statistics of whatever channels stay). Whatever has no rule
freezes the channels that it touches: a missing rule costs sparsity, never correctness.
"""

# Importing a module of rules registers them.
from lightning_earlybird.structure.rules import contractions, elementwise, layers, movement, normalisation
from lightning_earlybird.structure.rules.contractions import CONTRACTIONS
from lightning_earlybird.structure.rules.movement import MOVEMENTS
from lightning_earlybird.structure.rules.registry import RULES, Call, CallCounter, Operation, find_rule, freeze_all

__all__ = [
    "CONTRACTIONS",
    "MOVEMENTS",
    "RULES",
    "Call",
    "CallCounter",
    "Operation",
    "contractions",
    "elementwise",
    "find_rule",
    "freeze_all",
    "layers",
    "movement",
    "normalisation",
]
