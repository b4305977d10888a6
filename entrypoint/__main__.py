"""`python -m entrypoint` is `t2v`."""

from entrypoint.cli import main

main()
