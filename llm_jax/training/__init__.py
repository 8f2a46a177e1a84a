"""Training: `trainer.train` runs a complete run; `setup`, `inputs` and `start` are its parts, for custom loops."""
