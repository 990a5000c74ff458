"""The data set: drawn faces whose mouths follow synthetic speech. It is endless and seeded, and needs no licence."""
