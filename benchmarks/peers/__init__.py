"""The systems that are compared: this project's loaders and the ones that people use, each behind one protocol."""
