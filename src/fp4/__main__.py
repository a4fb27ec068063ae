"""The ``fp4`` command as ``python -m fp4``."""

from fp4.cli import main

if __name__ == "__main__":
    main()
