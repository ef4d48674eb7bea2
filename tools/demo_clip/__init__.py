"""Trains and grades the embedded CLIP."""
