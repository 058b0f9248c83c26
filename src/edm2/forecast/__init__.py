"""From a network that continues a film by one frame to ensembles of whole forecasts.

Modules:
    files: `Forecast`, its members with truth and start, on the disk.
    torus: `Torus`, drifting and diffusing fields whose law is known exactly.
"""

from edm2.forecast.files import Forecast, read_forecast, write_forecast
from edm2.forecast.torus import Torus

__all__ = ["Forecast", "Torus", "read_forecast", "write_forecast"]
