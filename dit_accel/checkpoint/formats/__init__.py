"""Published formats of weights, one file each; see `checkpoint.published`."""
