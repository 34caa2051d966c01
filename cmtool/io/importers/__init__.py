"""One file a foreign format: how its names, shapes and conventions become ours."""
