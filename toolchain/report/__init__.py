"""What a run came to, as one HTML page that needs no network.

May import `graph` and what stands above it.
"""

from toolchain.report.html import render_report, write_report

__all__ = ["render_report", "write_report"]
