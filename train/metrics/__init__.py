"""From logits to numbers with intervals: scores, the bootstrap over lesions, calibration, differences between runs."""
