"""What trains and grades the embedded models; not part of the wheel."""
