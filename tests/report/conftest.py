"""Makes the run folders of synthetic.py and the browser of browser.py importable here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
