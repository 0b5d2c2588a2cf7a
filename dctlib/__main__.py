"""Run the command line: ``python -m dctlib``."""

from dctlib.cli import main

if __name__ == "__main__":
    main()
