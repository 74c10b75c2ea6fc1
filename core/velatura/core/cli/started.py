"""`python -m velatura.core.cli.started WORD`: what DeepSpeed's launcher starts; the word is the command line."""

from __future__ import annotations

import base64
import json
import sys

from velatura.core.cli.program import main

if __name__ == "__main__":
    raise SystemExit(main(json.loads(base64.urlsafe_b64decode(sys.argv[1])), launched=True))
