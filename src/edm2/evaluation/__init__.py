"""Numbers about images: sets of images, extractors, references, results, cautions, and the judge of a run."""
