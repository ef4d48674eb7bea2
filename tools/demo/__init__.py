"""Trains and grades the embedded pipeline."""
