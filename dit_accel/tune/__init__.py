"""Tuning: finds the settings of a model, by search or by calibration, and writes them as a layer schedule."""
