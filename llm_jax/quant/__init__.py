"""Quantization: rules over names, and how scales and codes are found."""
