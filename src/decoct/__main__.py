"""`python -m decoct`: the command, where its script is not on the path."""

from decoct.cli import main

if __name__ == "__main__":
    main()
