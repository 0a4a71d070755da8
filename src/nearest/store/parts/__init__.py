"""The parts of a snapshot, one module each."""
