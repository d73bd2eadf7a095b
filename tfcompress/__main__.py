"""`python -m tfcompress` is the `tfcompress` command."""

from tfcompress.cli import main

main()
