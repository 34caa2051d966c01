"""Objectives, their parts, presets and the trainer."""
