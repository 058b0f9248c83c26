"""What happens at every step: the tracker, its averages, and where they live."""
