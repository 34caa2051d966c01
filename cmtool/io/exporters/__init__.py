"""One file a foreign format: our models under its names and conventions."""
