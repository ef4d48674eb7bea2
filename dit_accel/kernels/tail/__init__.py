"""The tail: key blocks that are not attended exactly, as one pseudo-key each, in the same softmax."""
