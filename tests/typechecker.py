"""Checks every annotation of the package while its tests run."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
