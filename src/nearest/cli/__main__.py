"""`python -m nearest.cli` is the `nearest` command."""

from nearest.cli import main

main()
