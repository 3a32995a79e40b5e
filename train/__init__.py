"""Shards to trained models to the study."""
