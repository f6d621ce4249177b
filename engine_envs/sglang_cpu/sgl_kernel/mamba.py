"""Imported by sglang for models with Mamba layers; none of its kernels is here."""

from . import __getattr__  # noqa: F401
