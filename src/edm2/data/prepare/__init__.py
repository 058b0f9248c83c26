"""Work done once, before training: survey, convert, encode."""
