"""A trained run and images that it has never seen: predictions, explanations, similar lesions, and their output."""
