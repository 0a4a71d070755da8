"""Clients of `nearest serve`: a memory, or RETRO's neighbours, that another machine holds."""
