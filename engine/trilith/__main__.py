"""`python -m trilith` is the `trilith` command."""

import sys

from trilith.cli import main

sys.exit(main())
