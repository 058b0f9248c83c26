"""A page in the browser on which one sees what EMA length, guidance and sampler do to a run's images.

- `choices`: one setting, and the command that makes the same images.
- `workbench`: models, images, curves and denoising paths of a run for any setting; no user interface.
- `page`: the page itself; needs gradio.
"""
