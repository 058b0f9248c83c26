"""The best generator that a run contains: EMA length, guide, guidance weight and interval, found after training.

Modules:
    plan: `TuningPlan`, how far the search goes.
    search: `tune`, one setting after the other.
    bench: Images and scores of settings, each evaluated once.
    result: `Tuned`, what a search found, and the files that keep it.
    page: The page about a search.

Ref: EDM2 Sec. 3.3 and 4 (lengths after training, guidance); arXiv 2406.02507 (a weaker guide); arXiv 2404.07724
(guidance in an interval).
"""

from edm2.tuning.bench import Score, open_guide
from edm2.tuning.page import write_tuning_report
from edm2.tuning.plan import TuningPlan
from edm2.tuning.result import BASELINE_SIGMA_REL, Knobs, Tried, Tuned, read_tuned, save_tuned
from edm2.tuning.search import tune

__all__ = [
    "BASELINE_SIGMA_REL",
    "Knobs",
    "Score",
    "Tried",
    "Tuned",
    "TuningPlan",
    "open_guide",
    "read_tuned",
    "save_tuned",
    "tune",
    "write_tuning_report",
]
