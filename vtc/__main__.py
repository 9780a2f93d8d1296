"""`python -m vtc` is `vtc`."""

import sys

from vtc.cli import main

sys.exit(main())
