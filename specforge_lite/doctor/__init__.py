"""Checks of this machine, of a target, of a draft."""

Problem = tuple[str, str]  # what a check yields: (level, message)
