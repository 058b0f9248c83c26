"""Post-hoc EMA inside other libraries' training loops.

- `edm2.ema.callbacks.transformers`: a callback for the Hugging Face Trainer
- `edm2.ema.callbacks.lightning`: a callback for the Lightning Trainer
- `edm2.ema.callbacks.optimizer`: a hook on any PyTorch optimiser, made by `PowerEMA.attach`
"""
