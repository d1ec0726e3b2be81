"""`python -m edgelm`: the command line."""

from edgelm.cli.main import main

main()
