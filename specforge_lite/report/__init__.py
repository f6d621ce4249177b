"""One self-contained report.html of a run: training curves, acceptance, generations, speed-up, provenance."""

from specforge_lite.report.decoding import token_texts
from specforge_lite.report.page import write_report
from specforge_lite.report.values import Decoding, Sample

__all__ = ["Decoding", "Sample", "token_texts", "write_report"]
