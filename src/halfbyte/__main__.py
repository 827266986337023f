"""``python -m halfbyte`` is the command line."""

import sys

from halfbyte.cli import main

sys.exit(main())
