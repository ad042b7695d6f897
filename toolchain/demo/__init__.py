"""The built-in VLM: task, training script, trained weights and held-out pictures. No network is needed to use it.

May import `bench` and what stands above it.
"""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
CALIBRATION = Path(__file__).parent / "pictures" / "calib.jsonl"
EVALUATION = Path(__file__).parent / "pictures" / "eval.jsonl"
