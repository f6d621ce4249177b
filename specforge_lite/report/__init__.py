"""One self-contained report.html of a run: training curves, acceptance, generations, speed-up, provenance."""

from specforge_lite.report.page import write_report

__all__ = ["write_report"]
