"""What `make kernels` compiles: the builds of each folder of `dit_accel/kernels`, and the check of their resources."""
