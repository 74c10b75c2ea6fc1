"""Faces in pictures: finding, aligning and recognising them, and the rewards that are made of it."""
