"""`python -m edm2` is the `edm2` command; `torchrun -m edm2` starts it on many processes."""

from edm2.cli import main

if __name__ == "__main__":
    main()
