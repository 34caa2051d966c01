"""Judging images: features, statistics of them, and distances between sets."""
