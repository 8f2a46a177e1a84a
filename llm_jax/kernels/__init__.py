"""Number formats and kernels: arrays in, arrays out."""
