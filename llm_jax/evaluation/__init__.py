"""What a model is asked, and how."""
