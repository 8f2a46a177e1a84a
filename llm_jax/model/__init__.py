"""The transformer and its parts: layers, positions, attention."""
