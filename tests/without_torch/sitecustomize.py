"""For hosts of tests: three plugins of optillm load torch, which no test but those with `COMPLETE` needs.

That takes half of the time of a start. Python imports this module by its name at every start.
"""

from __future__ import annotations

import sys
from typing import Any

modules: dict[str, Any] = sys.modules
modules.update(dict.fromkeys(("torch", "transformers", "spacy")))  # None: not there
