"""Real video for training and evaluation: reading any file at 25 fps with its speech, and measures of what is seen."""
