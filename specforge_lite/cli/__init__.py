"""Flags of each command; `commands` has the list of them."""
