"""From a network that continues a film by one frame to ensembles of whole forecasts.

Modules:
    cases: `Cases`, what forecasts start from.
    rollout: `roll_out`, step by step, each new frame joining the condition of the next.
    output: `make_forecast`, `make_ensemble`: many cases and members into one file, continued after a kill.
    files: `Forecast`, members with truth and start, on disk.
    page: The page that plays it.
    torus: `Torus`, drifting and diffusing fields whose law is known exactly.
"""

from edm2.forecast.cases import Cases, read_cases
from edm2.forecast.files import Forecast, read_forecast, write_forecast
from edm2.forecast.output import make_ensemble, make_forecast
from edm2.forecast.rollout import past_frames, roll_out
from edm2.forecast.torus import Torus

__all__ = [
    "Cases",
    "Forecast",
    "Torus",
    "make_ensemble",
    "make_forecast",
    "past_frames",
    "read_cases",
    "read_forecast",
    "roll_out",
    "write_forecast",
]
