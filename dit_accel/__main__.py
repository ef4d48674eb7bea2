"""`python -m dit_accel`: the same as `dit-accel`, for launchers that start modules."""

from dit_accel.cli.app import main

main()
