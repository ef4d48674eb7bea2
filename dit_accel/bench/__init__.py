"""Declared benchmarks of kernels and whole models."""
