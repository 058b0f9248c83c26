"""Profiles, targets, least squares, plans: float64, no modules."""
