"""Steps of whole models, timed."""
