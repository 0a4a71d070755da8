"""Where neighbours help: losses beside what a text shares with what was retrieved for it."""
