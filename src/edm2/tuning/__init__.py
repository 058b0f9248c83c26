"""The search for a finished run's best EMA length, guide, weight and interval."""
