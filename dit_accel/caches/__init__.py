"""Step caches: Diffusers' caches as part of an accelerator's settings, in every family, with a record of what ran."""
