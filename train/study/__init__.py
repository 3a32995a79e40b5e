"""Many runs: the cells of a grid and the workers that train them, and what their results say together."""
