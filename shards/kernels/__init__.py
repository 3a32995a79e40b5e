"""The C library and its Python side: everything that it does is also done without it, more slowly."""
