"""The experiment that compares configurations A to G, and its page."""
