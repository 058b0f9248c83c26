"""The experiment that compares configurations A to G, and its page.

Modules:
    plan: `LadderPlan`, what is trained and how it is judged.
    experiment: `run_ladder`, which trains and judges every configuration.
    page: The table and the page about the result.

Ref: EDM2 Table 1, Fig. 3.
"""

from edm2.ladder.experiment import Rung, run_ladder
from edm2.ladder.page import write_ladder_report
from edm2.ladder.plan import LadderPlan, with_length

__all__ = ["LadderPlan", "Rung", "run_ladder", "with_length", "write_ladder_report"]
