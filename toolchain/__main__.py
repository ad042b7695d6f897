"""`python -m toolchain` is the `mgvq` command."""

from toolchain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
