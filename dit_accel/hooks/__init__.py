"""A method at work in a transformer: the engine, its schedule and layers, the self-check, the report."""
