"""A page for the hand: edits in a browser, served on this machine only."""
