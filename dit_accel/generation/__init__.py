"""Loading any supported pipeline and calling it: what generating and evaluating share.

A model is found and its sizes are read before any weight is; a call is timed; what it makes is written to files.
"""
