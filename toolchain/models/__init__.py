"""What the workstation knows about families of VLMs: one file each, and nothing about families anywhere else.

The half of a family that the board needs too (pictures, prompts, positions) is in `toolchain.device.families`.
"""

from toolchain.models.family import Family
from toolchain.models.internvl import InternVL
from toolchain.models.qwen2_vl import Qwen2VL

FAMILIES: tuple[Family, ...] = (Qwen2VL(), InternVL())
