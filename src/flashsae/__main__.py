"""`python -m flashsae` is the command `flashsae`."""

from flashsae.cli import main

if __name__ == "__main__":
    main()
