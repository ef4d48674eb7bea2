"""The router: which key blocks each query block attends to, by content."""
