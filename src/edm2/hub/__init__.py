"""Models shared as a folder or on the Hugging Face hub: `save_pretrained`, the pipeline, the model card."""
