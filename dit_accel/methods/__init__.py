"""The attention methods, one file each; a file that defines `METHOD` is found by the registry."""
