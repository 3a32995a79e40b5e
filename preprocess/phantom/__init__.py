"""Procedural lesions: what each class looks like, how it is painted, and how it is photographed."""
