"""``python -m ocrm_ray`` is the same program as the console script ``ocrm-ray``."""

import sys

from ocrm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
