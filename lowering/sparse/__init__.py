"""What replaces dense attention over the tokens of a video or picture: laser, block-sparse and rain fusion."""
