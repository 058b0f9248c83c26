"""Post-hoc EMA inside other libraries' training loops."""
