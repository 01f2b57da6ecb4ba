"""Where the repository lies, and by what the processes that tests start find their modules."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
REPOSITORY = SUPPORT.parents[1]
PYTHONPATH = os.pathsep.join([str(SUPPORT), str(REPOSITORY)])
