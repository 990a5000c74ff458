"""User input, prepared for the encoders: picture, speech, prompt."""
