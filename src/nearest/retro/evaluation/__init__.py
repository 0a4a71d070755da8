"""Whether a RETRO model's neighbours help: losses with, without and with wrong ones."""
