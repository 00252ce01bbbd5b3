"""Lets the tests of the graph import their helpers, which stand beside them in a folder that is no package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
