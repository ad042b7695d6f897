"""mgvq: edge deployment toolchain for vision-language models. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
