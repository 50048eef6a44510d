"""`trilith parity`: runs two configs of one training for a few steps and names the first tensor that leaves tolerance.

It is the tool for silently wrong numbers. Every rank of both runs writes down what it computed (`record`), by canonical
name and with the boxes that it holds; the command puts the canonical tensors of both sides together, one at a time, and
compares them in the order of computation (`compare`): initial weights, then for each step activations, loss, gradients
from the last unit to the first, their norm, and the new weights. What several ranks of a side hold must agree, too.

B runs after A and takes over A's weights at the beginning of each step: a difference shows in the step in which it
arises, and rounding that training amplifies does not pile up over steps.
"""

from trilith.parity.compare import compare_recordings
from trilith.parity.record import record, record_rank
from trilith.parity.recording import Recording
from trilith.parity.result import Difference, Phase, Result
from trilith.parity.run import compare
from trilith.parity.side import Side, other_side

__all__ = [
    "Difference",
    "Phase",
    "Recording",
    "Result",
    "Side",
    "compare",
    "compare_recordings",
    "other_side",
    "record",
    "record_rank",
]
