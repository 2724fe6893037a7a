from __future__ import annotations

import sys

from imgsvc.main import main

sys.exit(main())
