"""An invisible mark in the pixels of a video, which says whose server made it and in which session."""
