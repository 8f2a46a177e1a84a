"""Training: `train` runs a whole run; `setup`, `inputs` and `start` are its pieces, for a loop of one's own."""
