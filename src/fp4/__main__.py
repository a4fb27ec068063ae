"""``python -m fp4``: the ``fp4`` command."""

from fp4.cli import main

if __name__ == "__main__":
    main()
