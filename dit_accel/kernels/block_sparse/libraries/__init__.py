"""Implementations by kernels that come with other libraries."""
