"""The data set: drawn faces whose mouths follow synthetic speech. Endless, seeded, free of licences."""
