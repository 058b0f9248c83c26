"""Callbacks that bring `edm2.ema` to trainers people already use; each module needs that trainer's library."""
