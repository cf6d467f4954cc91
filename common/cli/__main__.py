"""`python -m common.cli` is `maskwatch`."""

from common.cli import main

if __name__ == "__main__":
    main()
