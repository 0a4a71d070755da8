"""`python -m nearest` is the `nearest` command."""

from nearest.cli import main

main()
