"""What trains and grades the embedded models, and what compiles the kernels; not part of the wheel."""
