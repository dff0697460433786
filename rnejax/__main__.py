"""python -m rnejax: the command line, where the script is not on the path."""

from .cli import main

raise SystemExit(main())
