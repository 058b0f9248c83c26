"""The mathematics of averages: float64, no modules.

- `profiles`, `targets`: how much weight an average gives to each moment
- `motion`: how weights move, and what that makes of a profile's misfit
- `solve`: coefficients that combine stored averages
- `plans`, `planning`: which averages to track, and when to store and to delete them
"""
